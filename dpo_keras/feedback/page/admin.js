const SVG = "http://www.w3.org/2000/svg";
function shape(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
function plot(height, label, parts) {
  const svg = shape("svg", { viewBox: `0 0 720 ${height}`, role: "img", "aria-label": label });
  svg.append(...parts);
  return svg;
}
function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function people(rows) {
  const most = Math.max(1, ...rows.map((row) => row.judged));
  return plot(rows.length * 26 + 4, "Judgements by annotator", rows.flatMap((row, i) => {
    const y = i * 26 + 4, width = 380 * row.judged / most;
    return [
      shape("text", { x: 150, y: y + 14, "text-anchor": "end" }, row.name.slice(0, 24)),
      shape("rect", { class: "bar", x: 160, y, width, height: 18, rx: 3 }),
      shape("text", { x: 168 + width, y: y + 14 }, `${row.judged} judged, ${row.skipped} skipped`),
    ];
  }));
}

function hours(points, now) {
  const first = Math.floor(now / 3600) - 47, counts = new Array(48).fill(0);
  for (const [at, count] of points) { const i = at / 3600 - first; if (i >= 0 && i < 48) counts[i] = count; }
  const most = Math.max(1, ...counts), parts = [shape("line", { class: "axis", x1: 30, x2: 720, y1: 130.5, y2: 130.5 })];
  counts.forEach((count, i) => {
    const height = 110 * count / most;
    parts.push(shape("rect", { class: "bar", x: 32 + i * 14.3, y: 130 - height, width: 12, height }));
    if (i % 12 === 11) parts.push(shape("text", { x: 38 + i * 14.3, y: 145, "text-anchor": i === 47 ? "end" : "middle" }, i === 47 ? "now" : `${47 - i} h ago`));
  });
  parts.push(shape("text", { x: 26, y: 24, "text-anchor": "end" }, most), shape("text", { x: 26, y: 134, "text-anchor": "end" }, 0));
  return plot(150, `Judgements per hour; ${counts[47]} in this hour, at most ${most}`, parts);
}

function agreement(figures) {
  const known = figures.filter((f) => f.value != null), unknown = figures.filter((f) => f.value == null);
  const x = (value) => 240 + 400 * (Math.max(-0.25, value) + 0.25) / 1.25, box = document.createElement("div");
  if (known.length) {
    const parts = [0, 0.25, 0.5, 0.75, 1].flatMap((tick) => [
      shape("line", { class: "axis", x1: x(tick), x2: x(tick), y1: 0, y2: known.length * 28 }),
      shape("text", { x: x(tick), y: known.length * 28 + 13, "text-anchor": "middle" }, tick)]);
    known.forEach((f, i) => {
      const y = i * 28 + 14;
      parts.push(shape("text", { x: 228, y: y + 4, "text-anchor": "end" }, f.label));
      if (f.low != null) parts.push(shape("line", { class: "interval", x1: x(f.low), x2: x(f.high), y1: y, y2: y }));
      parts.push(shape("circle", { class: "bar", cx: x(f.value), cy: y, r: 5 }),
        shape("text", { x: 652, y: y + 4 }, f.value.toFixed(2)));
    });
    box.append(plot(known.length * 28 + 18, "Agreement with 95 % intervals: " + known.map((f) => `${f.label} ${f.value.toFixed(2)}`).join(", "), parts));
  }
  for (const f of unknown) box.append(element("p", `${f.label}: ${f.reason}`));
  return box;
}

async function show() {
  try {
    const all = await call("/api/admin"), quality = all.agreement;
    $("progress").max = Math.max(1, all.wanted); $("progress").value = all.judged;
    $("progress-text").textContent = `${all.judged} of ${all.wanted} judgements`;
    $("people").replaceChildren(all.people.length ? people(all.people) : element("p", "Nobody yet."));
    $("hours").replaceChildren(hours(all.hours, all.now));
    $("agreement").replaceChildren(quality.figures ? agreement(quality.figures) : element("p", "There is no judgement yet."));
    const findings = quality.findings || [];
    $("findings").replaceChildren(...(findings.length ? findings.map((text) => element("p", text)) : [element("p", "Nothing stands out.")]));
    complain("");
  } catch (error) {
    complain(error.message);
    if (error.status === 401 || error.status === 403) return;
  }
  setTimeout(show, 10000);
}
(async () => { try { await signIn(); } catch (error) { complain(error.message); return; } show(); })();

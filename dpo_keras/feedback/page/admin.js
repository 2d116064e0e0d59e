const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function element(tag, className, text, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}
// The policy of the page forbids style attributes; properties are set one by one.
function placed(className, properties) {
  const made = element("div", className);
  for (const [name, share] of Object.entries(properties)) made.style[name] = `${100 * share}%`;
  return made;
}
function chart(label, rows) {
  const made = element("ul", "chart", undefined, ...rows);
  made.setAttribute("aria-label", label);
  return made;
}

function people(rows) {
  const most = Math.max(1, ...rows.map((row) => row.judged));
  return chart("Judgements by annotator", rows.map((row) => {
    const more = [
      row.checks && plural(row.checks, "hidden check"), row.repeats && plural(row.repeats, "repeat"),
      row.skipped && `${row.skipped} skipped`, row.held && `${row.held} on the page now`,
    ].filter(Boolean).join(" · ");
    return element("li", "", undefined,
      element("span", "name", row.group ? `${row.name} (${row.group})` : row.name),
      element("div", "track", undefined, placed("bar", { width: row.judged / most })),
      element("span", "value", `${row.judged} judged`),
      ...(more ? [element("span", "detail", `and ${more}`)] : []));
  }));
}

function peopleNote(rows, all) {
  const sum = (key) => rows.reduce((total, row) => total + row[key], 0), checks = sum("checks"), repeats = sum("repeats");
  if (!checks && !repeats) return "";
  return `The round needs ${plural(all.wanted, "judgement")} and has ${all.judged}. Hidden checks (${checks}) and repeats (${repeats}) measure quality and do not count.`;
}

function hours(points, now) {
  const first = Math.floor(now / 3600) - 47, counts = new Array(48).fill(0);
  for (const [at, count] of points) { const i = at / 3600 - first; if (i >= 0 && i < 48) counts[i] = count; }
  const most = Math.max(1, ...counts), total = counts.reduce((sum, count) => sum + count, 0);
  const bars = counts.map((count, i) => {
    const bar = placed("bar", { height: count / most });
    bar.title = `${count}, ${47 - i} h ago`;
    return bar;
  });
  const plot = element("div", "hours", undefined, ...bars);
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `Judgements per hour; ${counts[47]} in this hour, at most ${most}`);
  const ticks = element("div", "ticks", undefined, ...["48 h ago", "36 h", "24 h", "12 h", "now"].map((text) => element("span", "", text)));
  return [plot, ticks, element("p", "note", `${total} in all, at most ${most} in an hour. Hidden checks, repeats and skips are left out.`)];
}

function agreement(figures) {
  const known = figures.filter((f) => f.value != null), unknown = figures.filter((f) => f.value == null);
  // From 0 to 1, or from below 0 where chance agrees more often than people do.
  const lowest = Math.min(0, ...known.map((f) => f.low ?? f.value)), step = lowest < -0.25 ? 0.5 : 0.25;
  const least = step * Math.floor(lowest / step);
  const x = (value) => (Math.min(1, Math.max(least, value)) - least) / (1 - least), shown = (value) => value.toFixed(2);
  const rows = known.map((f) => {
    const track = element("div", "track", undefined, ...(least < 0 ? [placed("zero", { left: x(0) })] : []));
    if (f.low != null) track.append(placed("interval", { left: x(f.low), width: x(f.high) - x(f.low) }));
    track.append(placed("dot", { left: x(f.value) }));
    const text = f.low != null ? `${shown(f.value)} (${shown(f.low)} to ${shown(f.high)})` : shown(f.value);
    return element("li", "", undefined, element("span", "name", f.label), track, element("span", "value", text));
  });
  if (rows.length) {
    const axis = Array.from({ length: (1 - least) / step + 1 }, (_, i) => String(least + i * step));
    rows.push(element("li", "", undefined, element("span"), element("div", "ticks", undefined, ...axis.map((text) => element("span", "", text))), element("span")));
  }
  return [...(rows.length ? [chart("Agreement with 95 % intervals", rows)] : []), ...unknown.map((f) => element("p", "note", `${f.label}: ${f.reason}.`))];
}

async function show() {
  try {
    const all = await call("/api/admin"), quality = all.agreement;
    $("progress").max = Math.max(1, all.wanted); $("progress").value = all.judged;
    $("progress-text").textContent = `${all.judged} of ${all.wanted} judgements`;
    $("people").replaceChildren(all.people.length ? people(all.people) : element("p", "", "Nobody yet."));
    $("people-note").textContent = peopleNote(all.people, all);
    $("hours").replaceChildren(...hours(all.hours, all.now));
    $("agreement").replaceChildren(...(quality.figures ? agreement(quality.figures) : [element("p", "", "There is no judgement yet.")]));
    const findings = quality.findings || [];
    $("findings").replaceChildren(...(findings.length ? findings.map((text) => element("p", "", text)) : [element("p", "", "Nothing stands out.")]));
    complain("");
  } catch (error) {
    if (error.status === 401 || error.status === 403) return closePage(error.message);
    complain(error.message);
  }
  setTimeout(show, 10000);
}
(async () => { try { await signIn(); } catch (error) { closePage(error.message); return; } show(); })();

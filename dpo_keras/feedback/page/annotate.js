let queue = [], state = {}, busy = false, shownAt = 0, seen = 0, waitTimer = 0, turn = 0;
const AHEAD = 3, MOST_WORDS = 6000, MOST_EDITS = 1500, LEAST_ALIKE = 1 / 3;

// --- differences -----------------------------------------------------------------------------
const segmenter = self.Intl && Intl.Segmenter ? new Intl.Segmenter(undefined, { granularity: "word" }) : null;
function wordsIn(text) {
  if (segmenter) return Array.from(segmenter.segment(text), (s) => ({ word: s.segment, at: s.index })).filter((w) => w.word.trim());
  return Array.from(text.matchAll(/[\p{L}\p{N}_]+|[^\s]/gu), (m) => ({ word: m[0], at: m.index }));
}

function wordsOf(element) {
  const found = [], walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    for (const w of wordsIn(walker.currentNode.data)) {
      found.push({ ...w, node: walker.currentNode });
      if (found.length > MOST_WORDS) return null;
    }
  }
  return found;
}

// Myers' greedy algorithm: flags the words that a shortest edit script deletes or inserts.
function flagDifferences(a, b) {
  let start = 0, endA = a.length, endB = b.length;
  while (start < endA && start < endB && a[start].word === b[start].word) start++;
  while (endA > start && endB > start && a[endA - 1].word === b[endB - 1].word) { endA--; endB--; }
  const n = endA - start, m = endB - start, most = n + m, trace = [];
  const v = new Int32Array(2 * most + 3), middle = most + 1;
  let edits = -1;
  for (let d = 0; d <= most && edits < 0; d++) {
    if (d > MOST_EDITS) return false;
    trace.push(v.slice(middle - d - 1, middle + d + 2));
    for (let k = -d; k <= d; k += 2) {
      let x = k === -d || (k !== d && v[middle + k - 1] < v[middle + k + 1]) ? v[middle + k + 1] : v[middle + k - 1] + 1;
      while (x < n && x - k < m && a[start + x].word === b[start + x - k].word) x++;
      v[middle + k] = x;
      if (x >= n && x - k >= m) { edits = d; break; }
    }
  }
  for (let d = edits, x = n, y = m; d > 0; d--) {
    const row = trace[d], at = (k) => row[k + d + 1], k = x - y;
    const down = k === -d || (k !== d && at(k - 1) < at(k + 1));
    const before = down ? k + 1 : k - 1, px = at(before), py = px - before;
    if (down) b[start + py].differs = true; else a[start + px].differs = true;
    x = px; y = py;
  }
  return true;
}

function markWords(words) {
  for (let i = words.length - 1; i >= 0; i--) {
    if (!words[i].differs) continue;
    let from = i; // neighbours in one text become one mark
    while (from > 0 && words[from - 1].differs && words[from - 1].node === words[i].node) from--;
    const range = document.createRange();
    range.setStart(words[from].node, words[from].at);
    range.setEnd(words[i].node, words[i].at + words[i].word.length);
    range.surroundContents(document.createElement("mark"));
    i = from;
  }
}

// Twice the words in common by all words, as of Dice; punctuation is in common between any texts.
function likeness(a, b) {
  const words = [...a, ...b].filter((w) => /[\p{L}\p{N}]/u.test(w.word));
  return words.filter((w) => !w.differs).length / Math.max(1, words.length);
}

function highlight() {
  const a = wordsOf($("left-body")), b = wordsOf($("right-body"));
  // Between texts with little in common nearly every word differs: marks would hide the texts.
  const useful = a && b && flagDifferences(a, b) && likeness(a, b) >= LEAST_ALIKE;
  if (useful) { markWords(a); markWords(b); }
  $("diff-button").disabled = !useful;
  $("diff-button").title = useful ? "Key D" : "These responses have too little in common to mark what differs.";
}

// --- showing -----------------------------------------------------------------------------------
function fill(element, nodes) { element.replaceChildren(...nodes.map(build)); }

function drawImage(presentation, number, count) {
  const image = document.createElement("img");
  image.src = `./api/image?presentation=${presentation}&number=${number}`;
  image.alt = `Image ${number + 1} of ${count}`;
  image.className = "shown";
  return image;
}

function drawTurns(turns) {
  return turns.map((turn) => {
    const box = document.createElement("div");
    box.className = "turn";
    if (turn.role) {
      const role = document.createElement("div");
      role.className = "role"; role.textContent = turn.role;
      box.append(role);
    }
    box.append(...turn.body.map(build));
    return box;
  });
}

function drawPrompt(turns, presentation, images) {
  const shown = Array.from({ length: images || 0 }, (_, number) => drawImage(presentation, number, images));
  $("prompt-body").replaceChildren(...shown, ...drawTurns(turns));
}

let drawn = null;
function draw() {
  const current = queue[0];
  clearTimeout(waitTimer);
  const ranks = !!current && !!current.responses;
  $("work").hidden = !current;
  $("choices").hidden = !current || ranks;
  $("ranks").hidden = $("ranked").hidden = !ranks;
  $("responses").hidden = ranks;
  $("diff-button").hidden = ranks;
  $("notice").hidden = !!current;
  if (!current) {
    drawn = null;
    $("notice-title").textContent = state.waiting ? "Nothing open at the moment" : "All done. Thank you!";
    $("notice-text").textContent = state.waiting
      ? "Others are working on the last pairs. If one comes free, it appears here."
      : "There is no pair left for you. You may close this page.";
    if (state.undoable != null) { $("choices").hidden = false; }
    waitTimer = setTimeout(refresh, 15000);
  } else if (drawn !== current.id) {
    drawn = current.id;
    drawPrompt(current.prompt, current.id, current.images);
    if (ranks) drawRanked(current.responses);
    else {
      fill($("left-body"), current.left);
      fill($("right-body"), current.right);
      highlight();
    }
    $("more").firstElementChild.textContent = ranks ? "Why (optional)" : "How much better, and why (optional)";
    document.querySelector("#more fieldset").hidden = ranks;
    document.querySelector("h1").textContent = document.title = ranks ? "Rank the responses" : "Which response is better?";
    document.querySelector("input[name=strength][value='']").checked = true;
    $("reason").value = "";
    for (const side of ["left", "right"]) $(side).classList.remove("chosen");
    $("scrolled").scrollTo(0, 0);
    $("prompt-heading").focus({ preventScroll: true });
    seen = 0; shownAt = performance.now();
  }
  for (const button of document.querySelectorAll(".choice")) button.disabled = busy || !current;
  $("undo").disabled = busy || state.undoable == null;
  if (ranks) drawOrder();
  if (state.wanted != null) {
    $("progress").max = Math.max(1, state.wanted); $("progress").value = state.judged;
    $("progress-text").textContent = `You: ${state.own ?? 0} · round: ${state.judged} of ${state.wanted}`;
  }
  document.dispatchEvent(new Event("drawn")); // the arena adds to it
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) seen += performance.now() - shownAt;
  else { shownAt = performance.now(); refresh(); }
});
addEventListener("pageshow", (event) => { if (event.persisted) refresh(); });

async function refresh() {
  if (busy || !csrf) return;
  const mine = ++turn; // an answer that others have overtaken is out of date
  try {
    const known = queue.map((one) => one.id);
    const answer = await call(`/api/next?count=${AHEAD}&known=${known.join(",")}`);
    if (mine !== turn) return;
    const held = new Map(queue.map((one) => [one.id, one]));
    queue = answer.presentations.map((one) => one.prompt ? one : held.get(one.id)).filter(Boolean);
    Object.assign(state, { waiting: answer.waiting, own: answer.own, judged: answer.judged, wanted: answer.wanted, undoable: answer.undoable });
    complain("");
  } catch (error) { if (mine !== turn) return; explain(error); }
  draw();
}

function explain(error) {
  if (error.status === 401) stop(error.message);
  else complain(error.message);
}

function stop(text) {
  queue = []; csrf = ""; draw(); clearTimeout(waitTimer);
  closePage(text);
}

// --- judging -----------------------------------------------------------------------------------
const newKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

// The same key is sent until an answer comes: whether the first one arrived or not, it counts once.
async function confirmed(path, body) {
  for (let attempt = 0; ; attempt++) {
    try { return await call(path, body); } catch (error) {
      if (![0, 429, 500, 503].includes(error.status)) throw error;
      complain(`Not saved yet: ${error.message} Trying again …`);
      await pause(Math.min(8000, 500 * 2 ** attempt));
    }
  }
}

function judge(choice) {
  if (busy || !queue[0] || queue[0].responses) return;
  const strength = document.querySelector("input[name=strength]:checked").value;
  if ($(choice)) $(choice).classList.add("chosen");
  send("/api/judgements", { choice, strength: strength && (choice === "left" || choice === "right") ? Number(strength) : null });
}

async function send(path, answer) {
  busy = true; turn++;
  const body = {
    presentation: queue[0].id, key: newKey(), ...answer,
    seconds: (seen + (document.hidden ? 0 : performance.now() - shownAt)) / 1000,
    reason: $("reason").value || null,
  };
  draw();
  try {
    const answer = await confirmed(path, body);
    Object.assign(state, { own: (state.own ?? 0) + (answer.again ? 0 : 1), judged: answer.judged, wanted: answer.wanted, undoable: answer.undoable });
    queue.shift();
    $("status").textContent = "Saved. Next pair.";
    complain("");
  } catch (error) {
    if (error.status === 409) queue.shift();
    busy = false; explain(error); draw();
    if (error.status === 409) { const text = error.message; await refresh(); complain(text); }
    return;
  }
  busy = false;
  if (queue.length) draw();
  await refresh();
}

async function undo() {
  if (busy || state.undoable == null) return;
  busy = true; turn++; draw();
  try {
    await confirmed("/api/undo", { presentation: state.undoable, key: newKey() });
    $("status").textContent = "Undone. The pair is shown again.";
    complain("");
  } catch (error) { busy = false; explain(error); }
  busy = false;
  await refresh();
}

for (const button of document.querySelectorAll(".choice")) button.addEventListener("click", () => judge(button.dataset.choice));
$("undo").addEventListener("click", undo);
function setDifferences(on) {
  document.body.classList.toggle("diff", on);
  $("diff-button").setAttribute("aria-pressed", String(on));
  remember("differences", on ? "on" : "off");
}
setDifferences(remembered("differences") !== "off");
$("diff-button").addEventListener("click", () => setDifferences(!document.body.classList.contains("diff")));
$("help-button").addEventListener("click", () => $("help").showModal());
$("more").addEventListener("toggle", () => { if ($("more").open) $("more").scrollIntoView({ block: "nearest" }); });
function setGuidelines(open) {
  $("guidelines").hidden = !open;
  $("guidelines-button").setAttribute("aria-expanded", String(open));
}
$("guidelines-button").addEventListener("click", () => setGuidelines($("guidelines").hidden));

// --- ranking -----------------------------------------------------------------------------------
let order = [], level = false; // numbers of responses, best first, those that tie in one list
const placed = () => order.flat();

function drawRanked(responses) {
  order = []; level = false;
  $("ranked").replaceChildren(...responses.map((body, number) => {
    const card = document.createElement("article"), head = document.createElement("h2"), text = document.createElement("div");
    const button = document.createElement("button");
    head.id = `ranked-${number}`; head.textContent = `Response ${number + 1}`;
    card.setAttribute("aria-labelledby", head.id);
    button.type = "button"; button.className = "place"; button.dataset.number = number;
    button.addEventListener("click", () => place(number));
    text.className = "text"; text.dir = "auto"; fill(text, body);
    card.append(head, button, text);
    return card;
  }));
}

function rankOf(number) {
  const at = order.findIndex((group) => group.includes(number));
  return at < 0 ? null : 1 + order.slice(0, at).flat().length;
}

function drawOrder() {
  const count = $("ranked").children.length, done = placed().length === count;
  for (const button of document.querySelectorAll(".place")) {
    const rank = rankOf(Number(button.dataset.number));
    button.textContent = rank ? `Rank ${rank}` : `Place it ${placed().length ? level ? "beside the last" : "next" : "first"}`;
    button.disabled = busy || !!rank;
  }
  $("order").replaceChildren(...order.map((group, at) => {
    const item = document.createElement("li");
    for (const number of group) {
      const chip = document.createElement("button");
      chip.type = "button"; chip.className = "chip"; chip.textContent = number + 1; chip.dataset.number = number;
      chip.setAttribute("aria-label", `Response ${number + 1}, rank ${rankOf(number)}; arrow keys move it`);
      item.append(chip);
    }
    item.dataset.at = at;
    return item;
  }));
  $("ranks-hint").textContent = done ? "Best first. Drag to change:" : `${placed().length ? "Next" : "Best first"}: press its number.`;
  for (const button of document.querySelectorAll(".ranks")) {
    const act = button.dataset.act;
    button.disabled = busy || (act === "save" && !done) || (act === "drop" && !order.length)
      || (act === "level" && (!order.length || done)) || (act === "undo" && state.undoable == null);
  }
  document.querySelector("[data-act=level]").setAttribute("aria-pressed", String(level));
}

function place(number) {
  const count = $("ranked").children.length;
  if (busy || number >= count || placed().includes(number)) return;
  if (level && order.length) order[order.length - 1].push(number); else order.push([number]);
  level = false;
  const left = [...Array(count).keys()].filter((n) => !placed().includes(n));
  if (left.length === 1 && order.length > 0) order.push(left);
  $("status").textContent = `Response ${number + 1}: rank ${rankOf(number)}.`;
  drawOrder();
}

// Puts a response at a place among the others, alone in its rank.
function move(number, at) {
  const before = order.slice(0, at).flat().filter((n) => n !== number).length;
  const groups = order.map((group) => group.filter((n) => n !== number)).filter((group) => group.length);
  let start = 0, to = 0;
  while (to < groups.length && start < before) start += groups[to++].length;
  groups.splice(to, 0, [number]);
  order = groups;
  drawOrder();
  document.querySelector(`.chip[data-number="${number}"]`).focus();
}

const ACTS = {
  level: () => { if (order.length && placed().length < $("ranked").children.length) level = !level; drawOrder(); },
  drop: () => {
    const last = order[order.length - 1];
    if (last) { last.pop(); if (!last.length) order.pop(); }
    level = false; drawOrder();
  },
  both_bad: () => rank({ choice: "both_bad" }), skip: () => rank({ choice: "skip" }), undo,
  save: () => {
    const count = $("ranked").children.length;
    if (placed().length === count) rank({ ranks: [...Array(count).keys()].map(rankOf) });
  },
};
function rank(answer) { if (!busy && queue[0] && queue[0].responses) send("/api/rankings", answer); }
for (const button of document.querySelectorAll(".ranks")) button.addEventListener("click", () => ACTS[button.dataset.act]());

// Dragging by mouse, pen or finger: the chip goes to the rank that it is dropped on.
let dragged = null;
$("order").addEventListener("pointerdown", (event) => {
  const chip = event.target.closest(".chip");
  if (!chip || busy) return;
  dragged = { chip, from: event.clientX }; chip.setPointerCapture(event.pointerId); chip.classList.add("dragged");
});
$("order").addEventListener("pointermove", (event) => {
  if (dragged) dragged.chip.style.translate = `${event.clientX - dragged.from}px`;
});
for (const name of ["pointerup", "pointercancel"]) $("order").addEventListener(name, (event) => {
  if (!dragged) return;
  const { chip, from } = dragged, number = Number(chip.dataset.number), own = chip.parentElement;
  dragged = null; chip.style.translate = ""; chip.classList.remove("dragged");
  if (name === "pointercancel" || Math.abs(event.clientX - from) < 8) return;
  const items = [...$("order").children].filter((item) => item !== own || item.children.length > 1);
  const at = items.filter((item) => { const box = item.getBoundingClientRect(); return (box.left + box.right) / 2 < event.clientX; });
  move(number, at.length ? 1 + Number(at[at.length - 1].dataset.at) : 0);
});
$("order").addEventListener("keydown", (event) => {
  const chip = event.target.closest(".chip");
  if (!chip || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  event.preventDefault();
  const number = Number(chip.dataset.number), at = Number(chip.parentElement.dataset.at), alone = order[at].length === 1;
  if (event.key === "ArrowLeft") move(number, alone ? at - 1 : at); else move(number, alone ? at + 2 : at + 1);
});

const KEYS = {
  1: () => judge("left"), 2: () => judge("right"), t: () => judge("tie"), b: () => judge("both_bad"),
  s: () => judge("skip"), u: undo, d: () => $("diff-button").click(), "?": () => $("help").showModal(),
};
addEventListener("keydown", (event) => {
  // A held key must not judge pair after pair.
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target.closest("textarea, input[type=text]")) return;
  if (!$("ranks").hidden) {
    const name = { "=": "level", backspace: "drop", enter: "save", b: "both_bad", s: "skip" }[event.key.toLowerCase()];
    // Enter on a button is a click on it.
    if (event.key === "Enter" && event.target.closest("button")) return;
    if (/^[1-5]$/.test(event.key)) { event.preventDefault(); return place(Number(event.key) - 1); }
    if (name) { event.preventDefault(); return ACTS[name](); }
  }
  const act = KEYS[event.key.toLowerCase()];
  if (act) { event.preventDefault(); act(); }
});

async function begin() {
  try {
    const me = await signIn();
    if (me.guidelines.length) {
      $("guidelines").className = "text"; fill($("guidelines"), me.guidelines);
      if (!remembered("guidelines-seen")) { setGuidelines(true); remember("guidelines-seen", "1"); }
    } else $("guidelines-button").hidden = true;
    await refresh();
  } catch (error) {
    if (error.status === 0) { complain(`${error.message} Trying again …`); await pause(3000); return begin(); }
    stop(error.message);
  }
}
begin();

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
  $("work").hidden = $("choices").hidden = !current;
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
    fill($("left-body"), current.left);
    fill($("right-body"), current.right);
    highlight();
    document.querySelector("input[name=strength][value='']").checked = true;
    $("reason").value = "";
    for (const side of ["left", "right"]) $(side).classList.remove("chosen");
    $("scrolled").scrollTo(0, 0);
    $("prompt-heading").focus({ preventScroll: true });
    seen = 0; shownAt = performance.now();
  }
  for (const button of document.querySelectorAll(".choice")) button.disabled = busy || !current;
  $("undo").disabled = busy || state.undoable == null;
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
    queue = answer.presentations.map((one) => one.left ? one : held.get(one.id)).filter(Boolean);
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

async function judge(choice) {
  const current = queue[0];
  if (busy || !current) return;
  busy = true; turn++;
  const strength = document.querySelector("input[name=strength]:checked").value;
  const body = {
    presentation: current.id, choice, key: newKey(),
    seconds: (seen + (document.hidden ? 0 : performance.now() - shownAt)) / 1000,
    reason: $("reason").value || null,
    strength: strength && (choice === "left" || choice === "right") ? Number(strength) : null,
  };
  if ($(choice)) $(choice).classList.add("chosen");
  draw();
  try {
    const answer = await confirmed("/api/judgements", body);
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

const KEYS = {
  1: () => judge("left"), 2: () => judge("right"), t: () => judge("tie"), b: () => judge("both_bad"),
  s: () => judge("skip"), u: undo, d: () => $("diff-button").click(), "?": () => $("help").showModal(),
};
addEventListener("keydown", (event) => {
  // A held key must not judge pair after pair.
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target.closest("textarea, input[type=text]")) return;
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

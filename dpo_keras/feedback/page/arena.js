// --- the arena: a person asks, two responses appear as they are written, and one is chosen ----------
let talk = { after: null, turns: [], go_on: true, longest: 8000 }, following = false, looking = false;
const UNFINISHED = ["waiting", "writing", "storing"];

document.addEventListener("drawn", () => {
  $("progress").hidden = true; $("notice").hidden = true;
  $("progress-text").textContent = `You: ${state.own ?? 0}`;
  document.body.classList.toggle("idle", !queue.length && !following);
  if (queue.length) {
    $("composer").hidden = $("writing").hidden = true; $("more").hidden = false;
  } else if (following) showWork();
  else look();
});

// What can be asked, or goes on being written: the server knows it after a reload, too.
async function look() {
  if (looking || !csrf) return;
  looking = true;
  try {
    talk = await call("/api/conversation");
    if (UNFINISHED.includes(talk.phase)) follow();
    else if (!queue.length) compose();
  } catch (error) { explain(error); }
  looking = false;
}

function compose() {
  const opens = $("composer").hidden;
  const goesOn = talk.after != null && remembered("anew") !== String(talk.after);
  $("composer").hidden = false; $("writing").hidden = true;
  $("said").hidden = $("anew").hidden = !goesOn;
  if (goesOn) $("said").replaceChildren(...drawTurns(talk.turns));
  $("composer-heading").textContent = goesOn ? "Go on with the response that you chose" : "Ask something";
  $("query").maxLength = talk.longest;
  $("composer-note").textContent = talk.go_on ? "" : "Each query stands alone: this policy knows no turns.";
  if (!opens) return;
  if (talk.phase === "failed") giveBack(talk.message);
  if (goesOn) $("composer").scrollIntoView({ block: "end" });
  $("query").focus({ preventScroll: true });
}

function giveBack(why) {
  if (!$("query").value) $("query").value = remembered("asked") || "";
  complain(why[0].toUpperCase() + why.slice(1));
}

async function ask() {
  const query = $("query").value;
  if (following || $("ask").disabled || !query.trim()) return;
  $("ask").disabled = true;
  remember("asked", query);
  try {
    await call("/api/query", { query, after: $("said").hidden ? null : talk.after });
    $("query").value = "";
    complain("");
    follow();
  } catch (error) {
    explain(error);
    if (error.status === 0) look(); // it may have arrived
    if (error.status === 409) { const text = error.message; await refresh(); complain(text); }
  }
  $("ask").disabled = false;
}

// --- texts that grow ---------------------------------------------------------------------------
function showWork() {
  $("composer").hidden = $("notice").hidden = $("more").hidden = true;
  $("work").hidden = $("choices").hidden = $("writing").hidden = false;
  document.body.classList.remove("idle");
  $("undo").disabled = true; // after the choice that comes next
}

function showSoFar(found) {
  drawPrompt(found.prompt);
  fill($("left-body"), found.left);
  fill($("right-body"), found.right);
  for (const side of ["left", "right"]) $(side).classList.remove("chosen");
  const ahead = found.position - 1;
  $("writing").textContent = found.phase !== "waiting" ? "The responses are being written …"
    : ahead > 0 ? `Waiting: ${ahead} ${ahead > 1 ? "queries are" : "query is"} ahead of yours.` : "Waiting: yours is next.";
  showWork();
}

async function* linesOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines;
  }
}

async function responsesSoFar() {
  const response = await fetch("./api/stream", { credentials: "same-origin", cache: "no-store" });
  if (!response.ok) throw new Failure(response.status, (await response.json()).error);
  let found;
  for await (const line of linesOf(response.body)) {
    found = JSON.parse(line);
    if (UNFINISHED.includes(found.phase)) showSoFar(found);
    complain("");
  }
  return found;
}

// Each line tells all there is, so after a break the next one is enough.
async function follow() {
  if (following) return;
  following = true;
  let found;
  for (let attempt = 0; !found || UNFINISHED.includes(found.phase);) {
    try { found = await responsesSoFar(); attempt = 0; } catch (error) {
      if (error.status === 401) { following = false; return stop(error.message); }
      complain(`${error.status ? error.message : "The server cannot be reached."} Trying again …`);
      await pause(Math.min(8000, 500 * 2 ** attempt++));
    }
  }
  following = false;
  const place = $("scrolled").scrollTop;
  await refresh();
  if (queue.length) {
    $("scrolled").scrollTo(0, place);
    $("status").textContent = "Both responses are complete.";
  } else {
    giveBack(found.phase === "failed" ? found.message
      : "The server was started anew before both responses were complete; ask again.");
  }
}

$("asking").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("query").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault(); ask();
});
$("anew").addEventListener("click", () => { remember("anew", String(talk.after)); compose(); $("query").focus(); });
KEYS.u = () => following || undo();
document.querySelector("[data-key=s]").textContent = "Skip: judge neither";
document.querySelector("#help p").textContent = "You see two responses to what you ask; who wrote them stays hidden.";

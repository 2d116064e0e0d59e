"use strict";
const $ = (id) => document.getElementById(id);
const TAGS = new Set(["p", "h4", "h5", "h6", "ul", "ol", "li", "pre", "code", "blockquote", "em",
  "strong", "s", "a", "br", "hr", "table", "thead", "tbody", "tr", "th", "td", "div", "span"]);
const CLASSES = new Set(["plain", "language", "syntax", "unseen-character"]);

// What models wrote becomes elements one by one; it is never parsed as HTML.
function build(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const [tag, attributes, children] = node;
  if (!TAGS.has(tag)) return document.createTextNode("");
  const element = document.createElement(tag);
  if (tag === "a" && /^https?:\/\//.test(attributes.href || "")) {
    element.href = attributes.href; element.rel = "noopener noreferrer nofollow"; element.target = "_blank";
  }
  if (tag === "li" && attributes.value) element.value = Number(attributes.value);
  if (CLASSES.has(attributes.class)) element.className = attributes.class;
  if (["p", "li", "h4", "h5", "h6", "div", "td", "th"].includes(tag)) element.dir = "auto";
  element.append(...children.map(build));
  return element;
}

class Failure extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

let csrf = "";
async function call(path, body) {
  const options = { headers: { Accept: "application/json" }, credentials: "same-origin", cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.headers["X-CSRF-Token"] = csrf;
    options.body = JSON.stringify(body);
  }
  let response;
  // Relative to the page: the server may be reached below a path of its host.
  try { response = await fetch(`.${path}`, options); } catch { throw new Failure(0, "the server cannot be reached."); }
  let content = {};
  try { content = await response.json(); } catch { if (response.ok) throw new Failure(0, "the answer broke off."); }
  if (!response.ok) throw new Failure(response.status, content.error || `error ${response.status}.`);
  return content;
}

function complain(text) { $("message").textContent = text; $("message").hidden = !text; }

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// Shows one sentence and nothing else, where nobody can work on this page.
function closePage(text) {
  let closed = $("closed");
  if (!closed) {
    closed = document.createElement("main");
    closed.id = "closed"; closed.setAttribute("role", "alert");
    closed.append(document.createElement("p"));
    document.body.append(closed);
  }
  closed.firstChild.textContent = text[0].toUpperCase() + text.slice(1);
  document.body.classList.add("closed");
}

// A link carries its token behind the #, which browsers send to nobody, logs included.
async function signIn() {
  const token = location.hash.slice(1);
  if (token && !$(token)) { // not one of the page's own anchors
    history.replaceState(null, "", location.pathname);
    // A link that was cut off must not open the page of whoever was here before.
    if (!/^[\w-]{20,200}$/.test(token)) throw new Failure(401, "this link is not valid, or has expired; ask for a new one.");
    await call("/api/session", { token });
  }
  const me = await call("/api/me");
  csrf = me.csrf;
  return me;
}

function remembered(key) { try { return localStorage.getItem(key); } catch { return null; } }
function remember(key, value) { try { localStorage.setItem(key, value); } catch { /* private window */ } }

function setTheme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  document.documentElement.classList.toggle("light", !dark);
  $("theme-button").textContent = dark ? "Light" : "Dark";
}
const systemDark = matchMedia("(prefers-color-scheme: dark)");
setTheme(remembered("theme") ? remembered("theme") === "dark" : systemDark.matches);
systemDark.addEventListener("change", (event) => { if (!remembered("theme")) setTheme(event.matches); });
$("theme-button").addEventListener("click", () => {
  const dark = !document.documentElement.classList.contains("dark");
  remember("theme", dark ? "dark" : "light");
  setTheme(dark);
});
$("logout-button").addEventListener("click", async () => {
  try { await call("/api/logout", {}); } catch (error) { if (error.status !== 401) return complain(error.message); }
  location.reload();
});

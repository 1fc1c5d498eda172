/*
 * The status page: draws what /events tells once a second.
 *
 * The one idea: what is there is changed in place, so that whoever reads, tabs or scrolls is left alone.
 * All that comes from the wire becomes a text node, never markup.
 */
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function draw(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    element.setAttribute(key, value);
  }
  element.append(...children);      // strings become text
  return element;
}

/* Changes nothing that is the same already: a screen reader would read it again. */
function say(element, text) {
  if (element.textContent !== text) {
    element.textContent = text;
  }
}

// --- numbers into words ---

function amount(octets) {
  let number = octets, unit = "B";
  for (const next of ["kB", "MB", "GB", "TB"]) {
    if (number < (unit === "B" ? 999.5 : 999.95)) break;
    number /= 1000;
    unit = next;
  }
  return `${unit === "B" ? Math.round(number) : number.toFixed(1)} ${unit}`;
}

const rate = (octets) => `${amount(octets)}/s`;
const count = (number) => number.toLocaleString("en");

function duration(seconds) {
  const whole = Math.floor(seconds), two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor(whole / 60) % 60)} min`;
  return `${Math.floor(whole / 86400)} d ${two(Math.floor(whole / 3600) % 24)} h`;
}

/* When it was by the clock, like the time of a line in the log; of another day with its date. */
function timeOfDay(rfc3339) {
  const then = new Date(rfc3339), isToday = then.toDateString() === new Date().toDateString();
  return (isToday ? "" : `${then.toLocaleDateString("en", { month: "short", day: "numeric" })} `) + then.toLocaleTimeString("en-GB");
}

const words = (name) => ({ close: "served", crowded_out: "evicted" })[name] || name.replaceAll("_", " ");
const commandOf = (word) => ({ connect: "CONNECT", bind: "BIND", udp: "UDP ASSOCIATE" })[word] || word;
const inHost = (host) => (host.includes(":") && !host.startsWith("[") ? `[${host}]` : host);
const place = (row) => (row.host === null ? "" : `${inHost(row.host)}:${row.port}`);
const spaced = (hex) => (hex.match(/../g) || []).join(" ");
const clip = (text, most) => (text.length > most ? `${text.slice(0, Math.max(1, most - 1))}\u2026` : text);

// --- the head, the counters ---

function showHead(status) {
  const address = status.listening[0];
  document.title = `${status.live} open \u2013 ${address} \u2013 socks5srv`;
  say($("version"), status.version);
  say($("address"), status.listening.join("  "));
  say($("about"), [
    `up ${duration(status.uptime)}`, status.auth === "password" ? "password required" : "no authentication", status.commands.map(commandOf).join(", "),
    ...(status.workers > 1 ? [`${status.workers} processes`] : []), ...(status.ready ? [] : [`not ready: ${status.reason}`]),
  ].join(" \u00b7 "));
  say($("try"), `curl -x ${address} example.com`);
}

function showCounters(status) {
  const counters = status.counters, sessions = counters.sessions;
  const failed = (sessions.failed || 0) + (sessions.denied || 0);
  showPairs($("counters"), [
    ["Open now", count(status.live)], ["Connections", count(counters.connections)], ["Up, total", amount(counters.up)], ["Down, total", amount(counters.down)],
    ["Denied or failed", count(failed)], ["Failed logins", count(counters.failed_logins)],
  ], true);
  const table = (numbers, kept) => {
    const rows = Object.entries(numbers).filter(([name, number]) => number || kept.includes(name));
    return rows.map(([name, number]) => [words(name), count(number)]);
  };
  showPairs($("by-event"), table({ close: 0, ...sessions }, ["close"]));
  showPairs($("by-reply"), table(counters.replies, ["succeeded"]));
  showPairs($("by-failure"), table(counters.handshake_failures, []));
}

function showPairs(list, pairs, tiles = false) {
  if (!pairs.length) pairs = [["none", ""]];
  const names = pairs.map(([name]) => name).join("|");
  if (list.dataset.names !== names) {
    list.dataset.names = names;
    list.replaceChildren(...pairs.flatMap(([name]) => {
      const pair = [make("dt", {}, name), make("dd")];
      return tiles ? [make("div", {}, ...pair)] : pair;
    }));
  }
  list.querySelectorAll("dd").forEach((element, index) => say(element, pairs[index][1]));
}

// --- the plot ---

const POINTS = 120;

function showPlot(rates) {
  const { up, down } = rates.history, most = Math.max(1, ...up, ...down), top = ceiling(most);
  for (const [name, values] of [["up", up], ["down", down]]) {
    const line = path(values, top);
    $(`line-${name}`).setAttribute("d", line);
    $(`area-${name}`).setAttribute("d", line && `${line}L1000 100L${left(values.length, 0)} 100Z`);
  }
  say($("rate-up"), rate(rates.up));
  say($("rate-down"), rate(rates.down));
  say($("tick-top"), rate(top));
  say($("tick-middle"), rate(top / 2));
  say($("plot-text"), `Up at most ${rate(Math.max(0, ...up))}, now ${rate(rates.up)}. Down at most ${rate(Math.max(0, ...down))}, now ${rate(rates.down)}.`);
}

function ceiling(number) {
  const power = 10 ** Math.floor(Math.log10(number));
  return Math.max(1000, [1, 2, 4, 5, 10].find((step) => step * power >= number) * power);
}

const left = (length, index) => (1000 * (POINTS - length + index)) / (POINTS - 1);

function path(values, top) {
  const points = values.map((value, index) => `${left(values.length, index).toFixed(1)} ${(100 - (99 * value) / top).toFixed(2)}`);
  return points.length ? `M${points.join("L")}` : "";
}

// --- the sessions ---

function showSessions(status) {
  const rows = new Map([...$("rows").children].map((element) => [element.dataset.id, element]));
  for (const session of status.sessions) {
    const id = String(session.id);
    const row = rows.get(id) || newRow(id);
    rows.delete(id);
    showSession(row, session, status.workers);
  }
  rows.forEach((row) => row.remove());
  $("sessions").hidden = !status.sessions.length;
  $("sessions-empty").hidden = Boolean(status.sessions.length);
  const shown = status.sessions.length;
  sayNowAndThen($("sessions-count"), shown < status.live ? `${count(status.live)} open, ${count(shown)} shown` : `${count(status.live)} open`);
}

function newRow(id) {
  const cell = (name, ...children) => make("td", { role: "cell", class: name }, ...children);
  const row = make("tr", { role: "row", "data-id": id },
    cell("id", `#${id}`), cell("client mono"), cell("user"), cell("command"),
    cell("", make("span", { class: "destination" }), make("span", { class: "peer mono" })),
    cell("number up", make("span"), make("small")), cell("number down", make("span"), make("small")), cell("number age"));
  $("rows").append(row);
  return row;
}

function showSession(row, session, workers) {
  const [id, client, user, command, target, up, down, age] = row.children;
  say(id, `#${session.id}${workers > 1 ? ` (${session.worker + 1})` : ""}`);
  say(client, session.client);
  client.title = session.via ? `via ${session.via}` : "";
  say(user, session.user || "\u2013");
  user.classList.toggle("nobody", !session.user);
  say(command, commandOf(session.command) || "\u2013");
  const asked = session.command === "udp" ? "any, by datagrams" : place(session) || "no request yet";
  say(target.firstChild, asked);
  say(target.lastChild, session.peer && session.peer !== asked ? `\u2192 ${session.peer}` : "");
  for (const [cell, octets, speed] of [[up, session.up, session.up_rate], [down, session.down, session.down_rate]]) {
    say(cell.firstChild, amount(octets));
    say(cell.lastChild, rate(speed));
    cell.classList.toggle("moving", speed > 0);
  }
  say(age, duration(session.seconds));
}

const spokenAt = new Map();

/* What is read aloud must not be read every second. */
function sayNowAndThen(element, text) {
  const quiet = element.getAttribute("aria-live") !== "off" && Date.now() - (spokenAt.get(element) || 0) < 8000;
  if (element.textContent === text) return;
  element.setAttribute("aria-live", quiet ? "off" : "polite");
  if (!quiet) spokenAt.set(element, Date.now());
  element.textContent = text;
}

// --- the list of conversations ---

let chosen = null;      // the id of the conversation that is shown
let loaded = null;      // it, with its steps
let opened = null;      // the number of the step whose fields are shown

function showList(recent) {
  $("panes").hidden = !recent.length && loaded === null;
  $("conversations-empty").hidden = Boolean(recent.length);
  const items = new Map([...$("list").children].map((element) => [element.dataset.id, element]));
  let before = null;
  for (const summary of recent) {
    const id = String(summary.id), item = items.get(id) || newItem(summary.id);
    items.delete(id);
    showItem(item, summary);
    const wanted = before === null ? $("list").firstChild : before.nextSibling;
    if (item !== wanted) $("list").insertBefore(item, wanted);
    before = item;
  }
  items.forEach((item) => {
    if (!item.contains(document.activeElement)) item.remove();      // or the focus would be lost with it
  });
  if (chosen === null && recent.length) choose(recent[0].id);
  const current = recent.find((summary) => summary.id === chosen);
  if (current && (loaded === null || loaded.id !== chosen || key(loaded, loaded.steps.length) !== key(current, current.steps))) {
    load(chosen);
  }
}

const key = (summary, steps) => [steps, summary.event, summary.command, summary.peer, summary.reply].join();

function newItem(id) {
  const button = make("button", { type: "button" }, make("strong", {}, make("span"), make("time")), make("small"));
  button.addEventListener("click", () => choose(id));
  return make("li", { "data-id": id }, button);
}

function showItem(item, summary) {
  const button = item.firstChild, [what, how] = button.children;
  say(what.firstChild, `#${summary.id} ${summary.command === "udp" ? "datagrams" : place(summary) || "no request"}`);
  say(what.lastChild, timeOfDay(summary.started));
  const first = isFailed(summary) ? summary.reason.replace(/^\S+:\d+: /, "") : commandOf(summary.command);      // without the address
  say(how, [first, outcome(summary), summary.user && `user ${summary.user}`].filter(Boolean).join(" \u00b7 "));
  how.className = isFailed(summary) ? "bad" : summary.event === "open" ? "good" : "";
  button.title = whole(summary);
  button.setAttribute("aria-current", String(summary.id === chosen));
}

function outcome(summary) {
  if (summary.event === "open") return "open";
  if (summary.event === "close") return `served in ${short(summary.seconds)}`;
  return words(summary.event) + (summary.reply ? ` (reply ${summary.reply.toString(16).padStart(2, "0")})` : "");
}

const isFailed = (summary) => !["open", "close"].includes(summary.event);

/* All of it, and nothing cut: its parts are in the order of a line in the log. */
function whole(summary) {
  const where = summary.command === "udp" ? "" : ` ${place(summary)}`;
  return [
    `#${summary.id}`, timeOfDay(summary.started), `client ${summary.client}`, summary.via && `via ${summary.via}`, summary.user && `user ${summary.user}`,
    summary.command && commandOf(summary.command) + where, outcome(summary), summary.reason,
  ].filter(Boolean).join(" \u00b7 ");
}

const short = (seconds) => (seconds < 1 ? `${(seconds * 1000).toFixed(1)} ms` : seconds < 60 ? `${seconds.toFixed(1)} s` : duration(seconds));

function choose(id) {
  chosen = id;
  opened = null;
  for (const item of $("list").children) {
    item.firstChild.setAttribute("aria-current", String(item.dataset.id === String(id)));
  }
  load(id);
}

let loading = null;     // only one at a time is asked for

async function load(id) {
  if (loading === id) return;
  loading = id;
  try {
    const answer = await fetch(`conversations/${id}.json`, { cache: "no-store" });
    if (answer.ok && chosen === id) {
      loaded = await answer.json();
      showDiagram();
      showDetail();
    }
  } catch (_error) {
    // The server has gone, as the head of the page says.
  } finally {
    loading = null;
  }
}

// --- the diagram ---

const HEAD = 50, ROW = 30, LINE = 16;     // of a row: what its lines of text are put on top of
const LABEL = 176;                         // that a label has at least before it is wrapped

let drawn = { id: null, width: 0, names: [], steps: 0, y: 0 };      // what the diagram shows, so that it can grow without being drawn again

/* The resolver has a lane only if it was asked. */
function participants(steps) {
  const asked = steps.some((step) => step.from === "resolver" || step.to === "resolver");
  return asked ? ["client", "proxy", "resolver", "target"] : ["client", "proxy", "target"];
}

function showDiagram() {
  const box = $("diagram"), width = Math.max(280, box.clientWidth || 600), steps = loaded.steps, names = participants(steps);
  const isSame = drawn.id === loaded.id && drawn.width === width && drawn.names.length === names.length;
  const svg = isSame ? box.firstChild : newDiagram(box, width, names);
  say($("told"), whole(loaded));
  for (const step of steps.slice(drawn.steps)) svg.append(drawStep(step, drawn.steps++, drawn.lanes, width, drawn.gutter));
  const height = Math.max(drawn.y, HEAD + ROW + LINE) + 10;
  fill(svg, { viewBox: `0 0 ${width} ${height}`, height, "aria-label": `Conversation ${loaded.id} in ${steps.length} steps` }, []);
  svg.querySelectorAll(".lane").forEach((lane) => lane.setAttribute("y2", height));
  const places = { client: loaded.client, target: loaded.command === "udp" ? "any" : loaded.peer || place(loaded) };
  svg.querySelectorAll(".where").forEach((text, index) => say(text, clip(places[names[index]] || "", drawn.gutter ? 24 : 21)));
}

function newDiagram(box, width, names) {
  const gutter = (width - 190) / (names.length - 1) >= 150 ? 66 : 0, edge = gutter ? 62 : 30, gap = (width - gutter - 2 * edge) / (names.length - 1);
  const lanes = Object.fromEntries(names.map((name, index) => [name, gutter + edge + index * gap]));
  drawn = { id: loaded.id, width, names, gutter, lanes, steps: 0, y: HEAD };
  pen.font = `13px ${getComputedStyle(document.body).fontFamily}`;
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.step : undefined;
  const svg = draw("svg", { role: "group" });
  for (const name of names) {
    svg.append(
      draw("line", { class: "lane", x1: lanes[name], x2: lanes[name], y1: HEAD - 12 }),
      laneText("head", lanes[name], 14, name, name, gutter), laneText("where mono", lanes[name], 31, "", name, gutter));
  }
  box.replaceChildren(svg);
  if (focused !== undefined) {
    requestAnimationFrame(() => {
      const step = svg.querySelector(`[data-step="${focused}"]`);
      if (step) step.focus({ preventScroll: true });
    });
  }
  return svg;
}

/* Above its lane; where that is at the edge of a narrow page, beginning or ending there. */
function laneText(style, x, y, text, lane, gutter) {
  const anchor = gutter ? "middle" : { client: "start", target: "end" }[lane] || "middle";
  return draw("text", { class: style, x: x + { start: -30, middle: 0, end: 30 }[anchor], y, "text-anchor": anchor }, text);
}

const pen = document.createElement("canvas").getContext("2d");     // measures text that is not drawn yet
const NAME = 1.12;      // how much wider bold letters are than others, at most

/* The words in lines that have room, each with its words, its style and its width; a word that is too long for any line is cut. */
function wrapped(name, rest, room) {
  const lines = [{ name: "", rest: "", wide: 0 }];
  for (const [style, text] of [["name", name], ["rest", rest]]) {
    const most = room / (style === "name" ? NAME : 1);
    for (const word of text.split(" ").filter(Boolean).flatMap((long) => pieces(long, most))) {
      const wide = pen.measureText(`${word} `).width * (style === "name" ? NAME : 1);
      let line = lines[lines.length - 1];
      if (line.wide && line.wide + wide > room) lines.push(line = { name: "", rest: "", wide: 0 });
      line[style] += (line.wide ? " " : "") + word;
      line.wide += wide;
    }
  }
  return lines;
}

/* At a dot or a dash, if there is one. */
function pieces(word, most) {
  const found = [];
  let piece = "";
  for (const letter of word) {
    if (pen.measureText(piece + letter).width > most) {
      const end = piece.search(/[^-.:/]*$/) || piece.length;
      found.push(piece.slice(0, end));
      piece = piece.slice(end);
    }
    piece += letter;
  }
  return [...found, piece];
}

/* Lines of text in the middle of a place, on a ground of their own where a lane would run through them. */
function textBlock(style, lines, middle, y) {
  const wide = Math.max(...lines.map((line) => line.wide)) + 4;
  const text = draw("text", { class: style, y, "text-anchor": "middle" }, ...lines.flatMap((line, index) => [
    index ? " " : "",
    draw("tspan", { x: middle, y: y + index * LINE }, draw("tspan", { class: "name" }, line.name), line.rest),
  ]));
  return [draw("rect", { class: "ground", x: middle - wide / 2, y: y - 13, width: wide, height: lines.length * LINE + 1, rx: 3 }), text];
}

function drawStep(step, index, lanes, width, gutter) {
  const from = lanes[step.from] || lanes.client, to = lanes[step.to] || lanes.proxy, isNote = step.kind === "note";
  const title = (isNote ? step.title : step.exhibit && step.exhibit.title) || "";
  const rest = isNote && title.endsWith("OPEN") ? "" : step.label.slice(title.length);    // its ends are those of the diagram
  const span = isNote ? lanes.target - lanes.client - 20 : Math.max(Math.abs(to - from) - 14, LABEL);
  const lines = wrapped(title, rest, Math.min(span, width - gutter - 8)), half = Math.max(...lines.map((line) => line.wide)) / 2 + 4;
  const middle = isNote ? (lanes.client + lanes.target) / 2 : Math.max(gutter + half, Math.min(width - half, (from + to) / 2));
  const y = drawn.y, high = ROW + lines.length * LINE;
  drawn.y += high;
  const group = draw("g", {
    role: "button", tabindex: 0, "data-step": index, "aria-controls": "detail", "aria-pressed": String(index === opened), "aria-label": aloud(step, index),
    class: `${step.kind} ${isBad(step) ? "bad" : ""}`,
  }, draw("title", {}, step.label), draw("rect", { class: "hit", x: 1, y: y + 1, width: width - 2, height: high - 3, rx: 6 }));
  if (isNote) {
    group.append(draw("rect", { class: "band", x: lanes.client - 12, y: y + 10, width: lanes.target - lanes.client + 24, height: high - 20, rx: 13 }));
  } else {
    group.append(...arrow(from, to, y + high - 13));
  }
  group.append(...textBlock("label", lines, middle, y + (isNote ? 27 : 22)));
  if (gutter) group.append(draw("text", { class: "at", x: gutter - 8, y: y + high - 17, "text-anchor": "end" }, after(step.at)));
  group.addEventListener("click", () => open(index));
  group.addEventListener("keydown", (event) => pressed(event, index));
  return group;
}

function arrow(from, to, y) {
  const way = Math.sign(to - from) || 1;
  return [
    draw("path", { class: "arrow", d: `M${from + way * 3} ${y}H${to - way * 8}` }),
    draw("path", { class: "tip", d: `M${to - way * 2} ${y}l${-way * 9} -4.5v9z` }),
  ];
}

const after = (seconds) => (seconds < 10 ? `+${(seconds * 1000).toFixed(1)} ms` : `+${duration(seconds)}`);

function aloud(step, index) {
  const way = step.kind === "note" ? "" : `${step.from} to ${step.to}: `;
  return `${index + 1}, ${way}${step.label}, after ${after(step.at).slice(1)}`;
}

function isBad(step) {
  if (step.kind !== "message") return Boolean(step.failed);
  return step.exhibit.fields.some((field) => ["REP", "STATUS"].includes(field.name) && field.octets && field.octets !== "00"
    || field.name === "METHOD" && field.octets === "ff");
}

function pressed(event, index) {
  const steps = $("diagram").querySelectorAll("[data-step]");
  const next = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: steps.length - 1 }[event.key];
  if (event.key === "Enter" || event.key === " ") open(index);
  else if (next !== undefined && steps[next]) steps[next].focus();
  else return;
  event.preventDefault();
}

function open(index) {
  opened = index;
  for (const step of $("diagram").querySelectorAll("[data-step]")) {
    step.setAttribute("aria-pressed", String(Number(step.dataset.step) === index));
  }
  showDetail();
  const isBelow = getComputedStyle($("detail")).position === "static";
  if (isBelow) $("detail").scrollIntoView({ block: "nearest" });       // or nothing would seem to happen on a phone
}

// --- a message ---

let detailOf = "";      // what is shown, so that it is not drawn again while somebody reads

function showDetail() {
  const step = loaded && opened !== null ? loaded.steps[opened] : undefined;
  const which = `${loaded && loaded.id}.${step ? opened : ""}`;
  if (which === detailOf) return;
  detailOf = which;
  if (!step) $("detail").replaceChildren(make("p", { class: "hint" }, "Choose an arrow (click or tap it, or Tab and Enter): its message is shown here, field by field."));
  else if (step.kind === "message") $("detail").replaceChildren(...messageDetail(step.exhibit));
  else $("detail").replaceChildren(make("h3", {}, step.kind === "note" ? "What happened" : `${step.from} \u2192 ${step.to}`), make("p", { class: "line" }, after(step.at)), make("p", {}, step.label));
}

function messageDetail(exhibit) {
  const octets = exhibit.length === null ? [] : [`${exhibit.length} octet${exhibit.length === 1 ? "" : "s"}`];
  return [
    make("h3", {}, exhibit.title),
    make("p", { class: "line" }, [`${exhibit.sender} \u2192 ${exhibit.receiver}`, ...octets, after(exhibit.at), ...(exhibit.section ? [exhibit.section] : [])].join(" \u00b7 ")),
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "The message as the RFC draws it" }, picture(exhibit)),
    fieldTable(exhibit),
    make("div", { class: "remarks" }, ...exhibit.remarks.map(remark)),
  ];
}

function picture(exhibit) {
  const row = (title, texts) => make("tr", {}, make("th", { scope: "row" }, title), ...texts.map((text) => make("td", {}, text)));
  return make("table", { class: "picture" },
    make("thead", {}, make("tr", {}, make("td"), ...exhibit.fields.map((field) => make("th", { scope: "col" }, field.name)))),
    make("tbody", {}, row("size", exhibit.fields.map((field) => field.size)), row("here", exhibit.fields.map(cell))));
}

function cell(field) {
  if (field.octets === null) return "\u2022\u2022\u2022";
  const octets = spaced(field.octets);
  return octets.length > 14 ? `${octets.slice(0, 5)} .. ${octets.slice(-2)}` : octets;
}

function fieldTable(exhibit) {
  const rows = exhibit.fields.flatMap((field) => field.meanings.map((meaning, index) => make("tr", index ? { class: "more" } : {},
    index ? make("td") : make("th", { scope: "row" }, field.name),
    make("td", { class: "octets" }, byFours(meaning.octets || "")), make("td", {}, meaning.text))));
  return make("table", { class: "fields", "aria-label": "Its fields" }, make("tbody", {}, ...rows));
}

/* Four octets in a line, in eight lines at most. */
function byFours(hex) {
  const lines = (hex.match(/.{1,8}/g) || []).map(spaced);
  return lines.slice(0, 8).join("\n") + (lines.length > 8 ? " .." : "");
}

function remark(text) {
  if (text.startsWith("! ")) return make("p", { class: "deviation" }, make("b", {}, "Not as in the RFC: "), text.slice(2));
  return make("p", text.startsWith('"') ? { class: "says" } : {}, text);
}

// --- what comes ---

let lastHeard = 0;

function show(status) {
  showHead(status);
  showCounters(status);
  showPlot(status.rates);
  showSessions(status);
  showList(status.recent);
}

function state(name, text) {
  $("state").dataset.state = name;
  say($("state-text"), text);
}

function listen() {
  const events = new EventSource("events");
  events.onmessage = (event) => {
    lastHeard = Date.now();
    state("live", "live");
    show(JSON.parse(event.data));
  };
  events.onerror = () => {
    state("gone", "disconnected");
    if (events.readyState === EventSource.CLOSED) {     // it has been turned away, and would not try again by itself
      setTimeout(listen, 3000);
    }
  };
}

setInterval(() => {
  if (lastHeard && Date.now() - lastHeard > 6000) state("gone", "disconnected");
}, 1000);

let redrawing;
addEventListener("resize", () => {
  clearTimeout(redrawing);
  redrawing = setTimeout(() => loaded && showDiagram(), 150);
});

showDetail();
listen();

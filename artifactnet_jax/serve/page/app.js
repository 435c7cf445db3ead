"use strict";

// What a folder is searched for; a file that is named itself may be any.
const SUFFIXES = (
  ".3gp .3g2 .3gpp .aac .adts .ac3 .aif .aiff .aifc .aff .amr .awb .ape .wma .asf " +
  ".wmv .au .snd .avi .caf .dsf .dts .dtshd .eac3 .ec3 .flac .fla .flv .f4v .dff .iff " +
  ".8svx .loas .latm .mka .mkv .mk3d .mlp .mov .qt .mp3 .mp2 .mp1 .mpa .mpga .mp4 .m4a " +
  ".m4b .m4p .m4r .m4v .f4a .f4b .ismv .isma .mpc .mpp .mpg .mpeg .vob .m2p .ts " +
  ".m2ts .mts .m2t .mxf .nut .ogg .oga .ogv .ogx .opus .spx .oma .aa3 .omg .qoa .rm .ra " +
  ".rmvb .shn .tak .thd .truehd .tta .voc .w64 .wav .wave .bwf .rf64 .webm .weba .wsd " +
  ".wtv .wv .xwma"
).split(" ");
const GROUP = { files: 16, bytes: 32 * 2 ** 20 }; // of one upload request
const LABELS = {
  "ai": "AI",
  "partly-ai": "Partly AI",
  "unclear": "Unclear",
  "real": "No sign of AI",
  "undecided": "Undecided",
  "failed": "Failed",
};
const VERDICTS = Object.keys(LABELS).filter((key) => key !== "failed");
const POLL_MS = 1500;
const STREAMS = 3; // that may fail in a row before the page polls instead

const byId = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

let limits = null; // of the service
let chosen = []; // [{ file, name }]
let batch = null; // the one on show: { id, tracks: Map of file id -> track, stopped }

// --- the service ---------------------------------------------------------------------------

class ApiError extends Error {
  constructor(status, kind, message) {
    super(message);
    this.status = status;
    this.kind = kind;
  }
}

function authorization() {
  const token = sessionStorage.getItem("token");
  return token ? { authorization: `Bearer ${token}` } : {};
}

// A reply that is not an error. What is worth another try is tried again, when the service says.
async function call(method, path, { body, headers = {}, tries = 5 } = {}) {
  for (let left = tries - 1; ; left--) {
    let reply = null;
    try {
      reply = await fetch(path, { method, body, headers: { ...authorization(), ...headers } });
    } catch {
      if (left <= 0) throw new ApiError(0, "network", "The service cannot be reached. Is it running?");
    }
    if (reply && reply.ok) return reply;
    if (reply && (![429, 503].includes(reply.status) || left <= 0)) throw await problem(reply);
    const seconds = Number(reply?.headers.get("retry-after")) || 2 ** (tries - 1 - left);
    await sleep(1000 * Math.min(seconds, 60));
  }
}

async function problem(reply) {
  let kind = "http";
  let message = `The service answered ${reply.status}.`;
  try {
    ({ kind, message } = (await reply.json()).error);
  } catch { /* not in our form */ }
  if (reply.status === 401) askForToken("This token is not valid here, or no longer.");
  return new ApiError(reply.status, kind, message);
}

async function getJson(path, options) {
  return (await call("GET", path, options)).json();
}

// --- what is shown at the start ------------------------------------------------------------

function askForToken(message) {
  byId("token-error").textContent = sessionStorage.getItem("token") ? message : "";
  sessionStorage.removeItem("token");
  byId("access").hidden = false;
  byId("start").hidden = true;
  byId("token").focus();
}

async function begin() {
  const info = await getJson("v1/info", { tries: 2 });
  limits = info.limits;
  byId("access").hidden = true;
  const engine = info.engine;
  const says = engine ? `${engine.weights.name} on ${engine.backend}` : "starting";
  byId("engine").replaceChildren(
    element("span", { textContent: `${says},` }), " ", element("span", { textContent: `version ${info.version}` }),
  );
  byId("limits").textContent =
    `Up to ${size(limits.file_bytes)} and ${Math.round(limits.audio_s / 60)} minutes each, ` +
    `${limits.files.toLocaleString()} at a time. ` +
    `Audio is removed once it is scored, results after ${age(limits.retention_s)}.`;
  const last = sessionStorage.getItem("batch");
  if (last) {
    try {
      await watch(last, new Map());
      return;
    } catch (error) {
      if (error.status !== 404) throw error;
      sessionStorage.removeItem("batch");
    }
  }
  byId("start").hidden = false;
}

// --- choosing ------------------------------------------------------------------------------

function isAudio(name) {
  const base = name.split("/").pop();
  return !base.startsWith(".") && SUFFIXES.some((suffix) => base.toLowerCase().endsWith(suffix));
}

function choose(entries) {
  const known = new Set(chosen.map(({ file, name }) => `${name}\n${file.size}`));
  const more = entries.filter(({ file, name }) => !known.has(`${name}\n${file.size}`));
  chosen = [...chosen, ...more];
  showProblem(entries.length ? "" : "No audio file was found there.");
  showChosen();
  if (more.length) say(`${count(more.length, "track")} added, ${chosen.length} in all.`);
}

function showChosen() {
  byId("chosen").hidden = !chosen.length;
  byId("chosen-list").replaceChildren(
    ...chosen.map((entry) => {
      const remove = element("button", { type: "button", className: "plain", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${entry.name}`);
      remove.addEventListener("click", () => {
        const next = remove.closest("li").nextElementSibling;
        chosen = chosen.filter((other) => other !== entry);
        const index = next ? [...next.parentNode.children].indexOf(next) - 1 : chosen.length - 1;
        showChosen();
        (byId("chosen-list").children[index]?.querySelector("button") ?? byId("choose-files")).focus();
      });
      const bytes = element("span", { className: "hint", textContent: size(entry.file.size) });
      const name = element("span", { className: "name", textContent: entry.name });
      return element("li", {}, name, bytes, remove);
    }),
  );
  byId("score").textContent = `Score ${count(chosen.length, "track")}`;
}

const named = (file) => ({ file, name: file.webkitRelativePath || file.name });

// Files of what was dropped; of folders the audio files, whatever their depth.
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map(named);
  const found = [];
  for (const entry of entries) await walk(entry, found, false);
  return found;
}

async function walk(entry, found, inside) {
  if (entry.isFile) {
    const name = entry.fullPath.replace(/^\//, "");
    if (inside && !isAudio(name)) return;
    found.push({ file: await new Promise((done, fail) => entry.file(done, fail)), name });
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    // It gives a hundred at a time.
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) return;
    for (const each of some) await walk(each, found, true);
  }
}

// --- uploading -----------------------------------------------------------------------------

async function start() {
  const entries = chosen;
  byId("score").disabled = true;
  try {
    const created = await (await call("POST", "v1/batch/create")).json();
    chosen = [];
    showChosen();
    const shown = show(created.id);
    sessionStorage.setItem("batch", created.id);
    byId("batch-title").focus();
    await uploadAll(shown, entries);
    if (shown.stopped) return;
    await call("POST", `v1/batch/${shown.id}/commit`);
    byId("batch-title").textContent = "Scoring";
    say("All tracks are uploaded. Scoring has begun.");
    await follow(shown);
  } finally {
    byId("score").disabled = false;
  }
}

async function uploadAll(shown, entries) {
  byId("batch-title").textContent = "Uploading";
  let sent = 0;
  const done = (group) => {
    sent += group.length;
    setProgress(sent, entries.length, `${sent} of ${entries.length} uploaded`);
  };
  setProgress(0, entries.length, `0 of ${entries.length} uploaded`);
  for (const group of groups(entries)) {
    if (shown.stopped) return;
    try {
      await uploadGroup(shown, group);
    } catch (error) {
      if (!isOneFiles(error)) throw error;
      // All files of a request count, or none: find the one.
      for (const entry of group) {
        try {
          await uploadGroup(shown, [entry]);
        } catch (reason) {
          if (!isOneFiles(reason)) throw reason;
          shown.refused += 1;
          const row = { error: { kind: reason.kind, message: reason.message } };
          showRow(shown, addTrack(shown, entry), row);
        }
      }
    }
    done(group);
  }
}

const isOneFiles = (error) => [400, 413, 422].includes(error.status) && error.kind !== "too-many";

function* groups(entries) {
  let group = [];
  let bytes = 0;
  for (const entry of entries) {
    if (group.length && (group.length === GROUP.files || bytes + entry.file.size > GROUP.bytes)) {
      yield group;
      [group, bytes] = [[], 0];
    }
    group.push(entry);
    bytes += entry.file.size;
  }
  if (group.length) yield group;
}

async function uploadGroup(shown, group) {
  const body = new FormData();
  for (const { file, name } of group) body.append("files", file, name);
  const headers = { "idempotency-key": randomKey() };
  const reply = await call("POST", `v1/batch/${shown.id}/files`, { body, headers });
  const { files } = await reply.json();
  files.forEach((stored, k) => shown.tracks.set(stored.id, addTrack(shown, group[k])));
}

// crypto.randomUUID is missing where the page comes over plain HTTP.
function randomKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))]
    .map((byte) => byte.toString(16).padStart(2, "0"))
    .join("");
}

// --- following a batch ---------------------------------------------------------------------

// Show a batch again, after the page was loaded anew.
async function watch(id) {
  const status = await getJson(`v1/batch/${id}`);
  if (status.state === "open") throw new ApiError(404, "open", ""); // its upload was cut short
  const shown = show(id);
  byId("batch-title").textContent = "Scoring";
  await follow(shown);
}

async function follow(shown) {
  let last = "0";
  let failures = 0;
  const seen = (id) => {
    last = id;
    failures = 0;
  };
  while (!shown.stopped && failures < STREAMS) {
    try {
      if (await stream(shown, last, seen)) return;
    } catch (error) {
      if (shown.stopped) return;
      if (error.status >= 400 && error.status < 500) throw error;
    }
    failures += 1;
    await sleep(500 * failures);
  }
  while (!shown.stopped) {
    if (await poll(shown)) return;
    await sleep(POLL_MS);
  }
}

// Read server-sent events (EventSource cannot send a token); true when the batch is at its end.
async function stream(shown, last, seen) {
  const headers = { ...authorization(), accept: "text/event-stream", "last-event-id": last };
  const path = `v1/batch/${shown.id}/events`;
  const reply = await fetch(path, { headers, signal: shown.abort.signal });
  if (!reply.ok) throw await problem(reply);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return false;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const fields = Object.fromEntries(
        event.split("\n").filter((line) => !line.startsWith(":")).map((line) => {
          const at = line.indexOf(":");
          return [line.slice(0, at), line.slice(at + 1).trimStart()];
        }),
      );
      if (fields.event === "result") showResult(shown, JSON.parse(fields.data));
      if (fields.event === "progress" || fields.event === "done") showStatus(shown, JSON.parse(fields.data));
      if (fields.event === "deleted") throw new ApiError(404, "deleted", "This batch was deleted.");
      if (fields.id) seen(fields.id);
      if (fields.event === "done") {
        reader.cancel();
        return true;
      }
    }
  }
}

async function poll(shown) {
  const status = await getJson(`v1/batch/${shown.id}`);
  const reply = await call("GET", `v1/batch/${shown.id}/results?partial=true`);
  for (const line of (await reply.text()).split("\n")) {
    if (line) showResult(shown, JSON.parse(line));
  }
  showStatus(shown, status);
  return status.state === "done";
}

// --- showing a batch -----------------------------------------------------------------------

function show(id) {
  const tracks = new Map();
  batch = { id, tracks, stopped: false, abort: new AbortController(), filter: "all", refused: 0 };
  byId("start").hidden = true;
  byId("batch").hidden = false;
  byId("progress").hidden = false;
  byId("tracks").replaceChildren();
  setFilter("all");
  const none = Object.fromEntries(VERDICTS.map((key) => [key, 0]));
  showTotals(batch, { files: 0, scored: 0, failed: 0, verdicts: none });
  allowWhenDone(false);
  return batch;
}

// Before that "New batch" would lose sight of one that goes on; it can be deleted.
function allowWhenDone(done) {
  for (const button of [...byId("downloads").querySelectorAll("button"), byId("again")]) button.disabled = !done;
}

function setProgress(value, most, text) {
  Object.assign(byId("progress"), { value, max: Math.max(most, 1) });
  byId("count").textContent = text;
}

function showStatus(shown, status) {
  const done = status.scored + status.failed;
  const text = `${done} of ${status.files} done`;
  setProgress(done, status.files, text);
  showTotals(shown, status);
  if (status.state !== "done") {
    say(`${text}.`);
    return;
  }
  byId("batch-title").textContent = "Results";
  byId("progress").hidden = true;
  allowWhenDone(true);
  const numbers = { ...status.verdicts, failed: status.failed + shown.refused };
  const parts = Object.entries(LABELS).map(([key, label]) => `${numbers[key]} ${key === "ai" ? label : lower(label)}`);
  say(`Done: ${parts.join(", ")}.`, true);
}

function showTotals(shown, status) {
  const numbers = { ...status.verdicts, failed: status.failed + shown.refused };
  byId("totals").replaceChildren(
    ...Object.entries(LABELS).map(([key, label]) =>
      element("div", { className: key }, element("dt", { textContent: label }), element("dd", { textContent: numbers[key] })),
    ),
  );
}

function addTrack(shown, { file, name }) {
  const item = element("li", {});
  item.dataset.verdict = "wait";
  const badge = element("span", { className: "badge wait", textContent: "Waiting" });
  const waiting = element("div", { className: "waiting" }, badge, element("span", { className: "name", textContent: name }));
  item.append(waiting);
  item.hidden = shown.filter !== "all";
  byId("tracks").append(item);
  return { item, file, name, row: null };
}

function showResult(shown, row) {
  let track = shown.tracks.get(row.file);
  if (!track) {
    track = addTrack(shown, { file: null, name: row.path });
    shown.tracks.set(row.file, track);
  }
  if (!track.row) showRow(shown, track, row);
}

function showRow(shown, track, row) {
  track.row = row;
  const verdict = row.error ? "failed" : row.verdict;
  track.item.dataset.verdict = verdict;
  track.item.hidden = !["all", verdict].includes(shown.filter);
  const badge = element("span", { className: `badge ${verdict}`, textContent: LABELS[verdict] });
  const name = element("span", { className: "name", textContent: track.name });
  if (row.error) {
    name.append(element("span", { className: "note", textContent: cause(row) }));
    track.item.replaceChildren(element("div", { className: "waiting" }, badge, name));
    return;
  }
  for (const text of [where(row), row.reason]) {
    if (text) name.append(element("span", { className: "note", textContent: sentence(text) }));
  }
  if (row.warnings.length) {
    name.append(element("span", { className: "note", textContent: row.warnings.map(words).join(", ") }));
  }
  if (row.decoder) {
    name.append(element("span", { className: "note", textContent: sentence(row.decoder.sentence) }));
  }
  const label = element("span", { className: "label", textContent: "score " });
  const score = element("span", { className: "number score" }, label, row.score === null ? "none" : row.score.toFixed(3));
  const length = element("span", { className: "number length", textContent: clock(row.duration_s) });
  const summary = element("summary", {}, badge, name, row.segments.length ? spark(row) : element("span", {}), score, length);
  const details = element("details", {}, summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(detail(track));
  });
  track.item.replaceChildren(details);
}

// The message without the name that stands above it.
function cause(row) {
  const { message } = row.error;
  return row.path && message.startsWith(`${row.path}: `) ? message.slice(row.path.length + 2) : message;
}

const unclear = (row) =>
  row.band ? `; unclear from ${row.band[0].toFixed(4)} to ${Math.min(row.band[1], 1).toFixed(4)}` : "";

const WARNINGS = {
  "resampled": "The recording has another sample rate than the model.",
  "short": "It is shorter than a segment, so the verdict rests on little.",
  "silent": "There is nothing to judge.",
  "silent-segments": "They are left out.",
  "clipped": "Many samples lie at full scale.",
  "band-limited": "There is nothing above 16 kHz or less, as after lossy compression.",
  "truncated": "The file ends before its declared length.",
};

const words = (warning) => warning.replaceAll("-", " ");

const lower = (text) => `${text[0].toLowerCase()}${text.slice(1)}`;

// Where a track is AI that is so in part.
function where(row) {
  if (row.verdict !== "partly-ai") return "";
  return `AI ${row.spans.map((span) => `from ${clock(span.start_s)} to ${clock(span.end_s)}`).join(", ")}`;
}

// Segments are compared with even odds where the verdict is of more than them.
const limit = (row) => (row.evidence ? 0.5 : row.threshold);
const limitName = (row) => (row.evidence ? "even odds" : "threshold");

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

function detail(track) {
  const { row } = track;
  const box = element("div", { className: "detail" });
  if (row.warnings.length) {
    const list = row.warnings.map((w) => element("li", { textContent: `Warning: ${words(w)}. ${WARNINGS[w] ?? ""}` }));
    box.append(element("ul", { className: "warnings" }, ...list));
  }
  if (row.notices?.length) {
    const list = row.notices.map((text) => element("li", { textContent: `The file says of itself, which is no evidence of its sound: ${text}` }));
    box.append(element("ul", { className: "notices" }, ...list));
  }
  if (row.segments.length) box.append(chart(row));
  let player = null;
  if (track.file) {
    player = element("audio", { controls: true, preload: "none" });
    player.setAttribute("aria-label", `Listen to ${track.name}`);
    player.addEventListener("play", () => stopOthers(player));
    box.append(player);
  }
  if (row.segments.length) box.append(table(row, track, player));
  box.append(facts(row));
  if (row.evidence) box.append(element("p", { className: "hint", textContent: evidence(row) }));
  if (player) {
    const details = track.item.querySelector("details");
    player.src = URL.createObjectURL(track.file);
    details.addEventListener("toggle", () => details.open || player.pause());
  }
  return box;
}

function stopOthers(player) {
  for (const other of document.querySelectorAll("audio")) if (other !== player) other.pause();
}

function table(row, track, player) {
  const head = element("tr", {}, ...["Time", "Score", `Against ${limitName(row)}`].map((text) => element("th", { textContent: text, scope: "col" })));
  const lines = row.segments.map(({ start_s: from, score }) => {
    const time = element("td", {});
    if (player) {
      const play = element("button", { type: "button", textContent: `▶ ${clock(from)}` });
      play.setAttribute("aria-label", `Play from ${clock(from)}`);
      play.addEventListener("click", () => {
        player.currentTime = from;
        player.play().catch(() => showProblem(`Your browser cannot play ${track.name}.`));
      });
      time.append(play);
    } else {
      time.textContent = clock(from);
    }
    const side = score >= limit(row) ? "at or above" : "below";
    return element("tr", {}, time, element("td", { textContent: score.toFixed(3) }), element("td", { textContent: side }));
  });
  const caption = element("caption", { textContent: `Scores of ${count(row.segments.length, "segment")} of 4 s` });
  const scroll = element("div", { className: "scroll", tabIndex: 0 });
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", `Scores of the segments of ${track.name}`);
  scroll.append(element("table", {}, caption, element("thead", {}, head), element("tbody", {}, ...lines)));
  return scroll;
}

function decoder(row) {
  if (row.decoder === undefined) return "not looked for";
  if (row.decoder === null) return `none: ${row.decoder_reason}`;
  const { z, p, speed, band_hz: [low, high] } = row.decoder;
  const band = `${low.toLocaleString()} to ${high.toLocaleString()} Hz`;
  return `z ${z.toFixed(1)}, p ${p.toPrecision(2)}, speed ${speed}, from ${band}`;
}

const WITNESSES = {
  "base": "before anything is heard",
  "segments": "segments",
  "fine": "fine spectrum",
  "decoder": "lines of a decoder",
  "prior": "share of AI in the collection",
};

// Rounded so that what is shown adds up.
function evidence(row) {
  let [total, before] = [0, 0];
  const parts = Object.entries(row.evidence).map(([key, value]) => {
    total += value;
    const shown = Math.round(100 * total) / 100 - before;
    before = Math.round(100 * total) / 100;
    return `${WITNESSES[key]} ${signed(shown)}`;
  });
  return `Evidence for AI in log-odds: ${parts.join(", ")}; together ${signed(before)}.`;
}

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

function facts(row) {
  const point = row.operating_point ? ` (${row.operating_point})` : "";
  const pairs = {
    "Score and threshold": `${row.score === null ? "none" : row.score.toFixed(4)}, ${row.threshold.toFixed(4)}${point}${unclear(row)}`,
    "Decoder": decoder(row),
    "Recording": `${row.sample_rate.toLocaleString()} Hz, ${count(row.channels, "channel")}`,
    "Segments": `${row.n_segments}, ${row.aggregate}`,
    "Weights": `${row.weights.name} (${row.weights.sha256.slice(0, 12)})`,
    "Backend": `${row.backend}, ${row.dtype}`,
  };
  const items = Object.entries(pairs).map(([key, value]) =>
    element("div", {}, element("dt", { textContent: key }), element("dd", { textContent: value })),
  );
  return element("dl", { className: "facts" }, ...items);
}

// --- pictures ------------------------------------------------------------------------------

function svg(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// Bars of the segments' scores, those at or above the threshold in one path and the others in
// another. Segments may overlap: a bar ends where the next one begins.
function bars(row, x, y, floor, gap) {
  const paths = { over: "", under: "" };
  row.segments.forEach(({ start_s: from, score }, k) => {
    const end = Math.min(from + 4, row.segments[k + 1]?.start_s ?? Infinity);
    const [left, right] = [x(from), x(Math.min(end, Math.max(row.duration_s, from + 1)))];
    const side = score >= limit(row) ? "over" : "under";
    const top = Math.min(y(score), floor - 1.5);
    const edge = right - Math.min(gap, (right - left) / 4);
    paths[side] += `M${left.toFixed(2)} ${floor}V${top.toFixed(2)}H${edge.toFixed(2)}V${floor}Z`;
  });
  return Object.entries(paths).map(([side, d]) => svg("path", { class: side, d }));
}

// Stretches that are AI, behind the bars.
function spans(row, x, top, floor) {
  return (row.spans ?? []).map(({ start_s: from, end_s: to }) =>
    svg("rect", { class: "span", x: x(from), y: top, width: x(to) - x(from), height: floor - top }),
  );
}

function thresholdLine(d) {
  return [svg("path", { class: "halo", d }), svg("path", { class: "mark", d })];
}

function spark(row) {
  const [width, height] = [144, 32];
  const x = (t) => (t / Math.max(row.duration_s, 4)) * width;
  const y = (score) => height - score * (height - 2);
  return svg(
    "svg",
    { class: "spark", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    ...bars(row, x, y, height, 1.5),
    ...thresholdLine(`M0 ${y(limit(row))}H${width}`),
  );
}

const narrowScreen = matchMedia("(max-width: 44rem)");

function chart(row) {
  const narrow = narrowScreen.matches;
  const [width, height, left, right, top, bottom] = [narrow ? 360 : 1000, narrow ? 190 : 220, 34, 8, 20, 26];
  const x = (t) => left + (t / Math.max(row.duration_s, 4)) * (width - left - right);
  const y = (score) => top + (1 - score) * (height - top - bottom);
  const scores = row.segments.map((segment) => segment.score);
  const above = scores.filter((score) => score >= limit(row)).length;
  const text =
    `Score over time: ${above} of ${scores.length} segments at or above the ${limitName(row)} of ` +
    `${limit(row).toFixed(3)}; lowest ${Math.min(...scores).toFixed(3)}, highest ${Math.max(...scores).toFixed(3)}.`;
  const steps = [5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200];
  const step = steps.find((s) => row.duration_s / s <= (narrow ? 5 : 10)) ?? 14400;
  const ticks = [];
  for (let t = 0; t <= row.duration_s; t += step) {
    const anchor = t === 0 ? "start" : x(t) > width - 24 ? "end" : "middle";
    ticks.push(svg("text", { x: x(t), y: height - 8, "text-anchor": anchor }, clock(t)));
  }
  const grid = [0, 0.5, 1].flatMap((score) => [
    svg("path", { class: "axis", d: `M${left} ${y(score)}H${width - right}` }),
    svg("text", { x: left - 6, y: y(score) + 4, "text-anchor": "end" }, String(score)),
  ]);
  const at = y(limit(row));
  const label = { class: "label", x: width - right, y: top - 7, "text-anchor": "end" };
  return svg(
    "svg",
    { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": text },
    ...grid,
    ...spans(row, x, top, y(0)),
    ...bars(row, x, y, y(0), 3),
    ...thresholdLine(`M${left} ${at}H${width - right}`),
    svg("text", { class: "label", x: left, y: top - 7 }, "Score"),
    svg("text", label, `dashed: ${limitName(row)} ${limit(row).toFixed(3)}`),
    ...ticks,
  );
}

// --- results and what ends a batch ---------------------------------------------------------

async function download(form) {
  const reply = await call("GET", `v1/batch/${batch.id}/results?format=${form}`);
  const url = URL.createObjectURL(await reply.blob());
  const link = element("a", { href: url, download: `artifactnet-${batch.id.slice(0, 8)}.${form}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

async function remove() {
  const dialog = byId("confirm");
  dialog.returnValue = "keep";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  if (dialog.returnValue !== "delete") return;
  await call("DELETE", `v1/batch/${batch.id}`);
  leave();
  say("The batch is deleted.", true);
}

function leave() {
  if (batch) {
    batch.stopped = true;
    batch.abort.abort();
  }
  sessionStorage.removeItem("batch");
  byId("batch").hidden = true;
  byId("start").hidden = false;
  byId("choose-files").focus();
}

function setFilter(verdict) {
  batch.filter = verdict;
  for (const button of byId("filters").children) {
    button.setAttribute("aria-pressed", String(button.dataset.show === verdict));
  }
  for (const item of byId("tracks").children) {
    item.hidden = !["all", item.dataset.verdict].includes(verdict);
    if (verdict === "all") item.hidden = false;
  }
}

// --- small things --------------------------------------------------------------------------

function element(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

const count = (n, noun) => `${n.toLocaleString()} ${noun}${n === 1 ? "" : "s"}`;

function clock(seconds) {
  const whole = Math.round(seconds);
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

function size(bytes) {
  const units = ["bytes", "KB", "MB", "GB"];
  let k = 0;
  while (bytes >= 1000 && k < 3) [bytes, k] = [bytes / 1024, k + 1];
  return `${k && bytes < 10 ? bytes.toFixed(1) : Math.round(bytes)} ${units[k]}`;
}

const age = (seconds) =>
  seconds >= 172800 ? count(Math.round(seconds / 86400), "day") : count(Math.round(seconds / 3600), "hour");

// Screen readers are told at most every few seconds, and of the end in any case.
let said = 0;
function say(text, now = false) {
  if (!now && Date.now() - said < 5000) return;
  said = Date.now();
  byId("live").textContent = text;
}

function showProblem(text) {
  byId("problem").textContent = text;
}

// Run an action of the page; what goes wrong is told in one line.
const guarded = (action) => async (event) => {
  showProblem("");
  try {
    await action(event);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ApiError)) console.error(error);
    if (error.status !== 401) showProblem(error.message);
    if (error.kind === "deleted") leave();
  }
};

// --- wiring --------------------------------------------------------------------------------

byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = byId("token").value.trim();
  if (!token) return;
  sessionStorage.setItem("token", token);
  byId("token").value = "";
  guarded(begin)();
});
byId("choose-files").addEventListener("click", () => byId("files").click());
byId("choose-folder").addEventListener("click", () => byId("folder").click());
for (const id of ["files", "folder"]) {
  byId(id).addEventListener("change", (event) => {
    const entries = [...event.target.files].map(named);
    choose(id === "folder" ? entries.filter(({ name }) => isAudio(name)) : entries);
    event.target.value = ""; // so that the same can be chosen again
  });
}
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => event.preventDefault()); // not to open the file
}
byId("drop").addEventListener("dragover", () => byId("drop").classList.add("dragging"));
byId("drop").addEventListener("dragleave", () => byId("drop").classList.remove("dragging"));
byId("drop").addEventListener("drop", guarded(async (event) => {
  byId("drop").classList.remove("dragging");
  choose(await dropped(event.dataTransfer));
}));
byId("clear").addEventListener("click", () => {
  chosen = [];
  showChosen();
  byId("choose-files").focus();
});
byId("score").addEventListener("click", guarded(start));
byId("downloads").addEventListener("click", guarded(async (event) => {
  const form = event.target.dataset.form;
  if (form) await download(form);
}));
byId("filters").addEventListener("click", (event) => {
  if (event.target.dataset.show) setFilter(event.target.dataset.show);
});
byId("delete").addEventListener("click", guarded(remove));
narrowScreen.addEventListener("change", () => {
  for (const { item, row } of batch?.tracks.values() ?? []) item.querySelector(".chart")?.replaceWith(chart(row));
});
byId("again").addEventListener("click", leave);
guarded(begin)();

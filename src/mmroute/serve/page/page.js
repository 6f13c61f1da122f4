"use strict";
// The page of one gateway: asks it as any OpenAI client does, and draws what its headers and /stats say.
const $ = id => document.getElementById(id);
let image = null, asked = null, running = null, view = null, firstStats = true;
const picture = new Image();

const headers = () => ($("key").value ? { authorization: `Bearer ${$("key").value}` } : {});
const percent = x => (x === null || x === undefined ? "-" : `${Math.round(100 * x)} %`);
const short = x => (x === null || x === undefined ? "-" : x && Math.abs(x) < .01 ? (+x).toExponential(1) : (+x).toFixed(2));

// ---- the picture

function show(url) {
  image = url;
  $("preview").hidden = !url;
  $("hint").hidden = !!url;
  if (url) { $("preview").src = url; $("preview").alt = "The image that is asked about"; }
}
function take(file) {
  if (!file || !file.type.startsWith("image/")) return;
  const reader = new FileReader();
  reader.onload = () => show(reader.result);
  reader.readAsDataURL(file);
}
$("file").onchange = e => take(e.target.files[0]);
document.addEventListener("paste", e => take([...e.clipboardData.files][0]));
for (const kind of ["dragover", "dragleave", "drop"]) $("drop").addEventListener(kind, e => {
  e.preventDefault();
  $("drop").classList.toggle("over", kind === "dragover");
  if (kind === "drop") take(e.dataTransfer.files[0]);
});
$("clear").onclick = () => { show(null); $("file").value = ""; $("question").value = ""; $("question").focus(); };
for (const button of document.querySelectorAll("[data-task]")) button.onclick = async () => {
  const n = Math.floor(Math.random() * 500);
  const reply = await fetch(`example?task=${button.dataset.task}&n=${n}`, { headers: headers() });
  if (!reply.ok) return;
  const example = await reply.json();
  show(example.images[0]);
  $("question").value = example.question;
  $("question").dataset.answer = example.answer;
};
$("question").oninput = () => { delete $("question").dataset.answer; };

// ---- asking

function content() {
  // `<image>` marks where the picture goes; otherwise it goes first, as with `mmroute ask`.
  const part = { type: "image_url", image_url: { url: image } };
  const [before, ...rest] = $("question").value.split("<image>");
  const texts = [before, rest.join("")].map(t => t.trim());
  const text = t => (t ? [{ type: "text", text: t }] : []);
  if (!image) return text(texts.join(" ").trim());
  return rest.length ? [...text(texts[0]), part, ...text(texts[1])] : [part, ...text(texts[0])];
}

async function ask() {
  const parts = content();
  if (!parts.some(p => p.type === "text") || running) return;
  running = new AbortController();
  asked = image;
  busy(true);
  reset();
  const began = performance.now();
  let first = null;
  const body = {
    model: "auto", stream: true, stream_options: { include_usage: true }, messages: [{ role: "user", content: parts }],
    mmroute: { debug: true, ...(budgetTouched ? { budget: $("budget").value / 100 } : {}) },
  };
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST", headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify(body), signal: running.signal,
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    decide(reply.headers);
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices?.[0]?.delta ?? {};
      const text = delta.content ?? delta.reasoning_content ?? "";
      if (text && first === null) first = performance.now() - began;
      $("text").append(text);
      if (event.usage) $("timing").dataset.usage = `${event.usage.prompt_tokens} tokens read, ${event.usage.completion_tokens} written`;
      if (event.mmroute) traced(event.mmroute);
    }
    const right = $("question").dataset.answer;
    const seconds = ((performance.now() - began) / 1000).toFixed(2);
    $("timing").textContent = [$("timing").dataset.usage, `first word after ${Math.round(first ?? 0)} ms`, `${seconds} s in all`,
      right ? `right would be: ${right}` : ""].filter(Boolean).join(" · ");
  } catch (error) {
    $("badge").className = "badge error";
    $("badge").textContent = error.name === "AbortError" ? "stopped" : "failed";
    if (error.name !== "AbortError") $("why").textContent = error.message;
  } finally {
    running = null;
    busy(false);
    refresh();
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) if (piece.startsWith("data: ") && piece !== "data: [DONE]") yield JSON.parse(piece.slice(6));
  }
}

function busy(on) {
  $("send").disabled = on;
  $("stop").hidden = !on;
  $("text").classList.toggle("busy", on);
}
function reset() {
  $("text").textContent = $("timing").textContent = "";
  delete $("timing").dataset.usage;
  $("badge").className = "badge";
  $("badge").textContent = "rating";
  $("why").textContent = "The draft reads image and question.";
  $("tracecard").hidden = true;
}

let budgetTouched = false;
$("budget").oninput = () => { budgetTouched = true; $("budgetout").textContent = `${$("budget").value} %`; };
$("form").onsubmit = e => { e.preventDefault(); ask(); };
$("stop").onclick = () => running?.abort();
document.addEventListener("keydown", e => {
  if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); ask(); }
  if (e.key === "Escape") running?.abort();
});

// ---- the decision

const REASONS = {
  rating: { draft: "The score is not above the threshold: the draft answers.", target: "The score is above the threshold: the target answers." },
  unrated: "The draft gave no rating that could be read.", rater_timeout: "The draft did not rate in time.",
  forced: "The request itself chose the model.", capability: "Only this model can serve such a request.",
  circuit_open: "The other model is being left alone after failures.", fallback: "The other model failed, this one took over.",
  verify: "The draft's finished answer was looked at, and the target was asked after all.",
  budget_cap: "The target has no place left at the moment, or has cost what it may this hour.", always: "The policy sends everything here.",
};
function decide(h) {
  const get = name => h.get(`x-mmroute-${name}`);
  const route = get("route"), reason = get("reason");
  $("badge").className = `badge ${route}`;
  $("badge").textContent = `${route}: ${get("model")}`;
  const why = REASONS[reason] ?? reason;
  const drawn = reason === "rating" && get("threshold") === null;
  $("why").textContent = drawn ? `No threshold is in use yet, or the budget is all or nothing: the ${route} answers.` : typeof why === "string" ? why : why[route];
  for (const role of ["draft", "target"]) {
    const value = get(`${role}-rating`);
    $(`${role}bar`).style.width = value === null ? "0" : `${100 * value}%`;
    $(`${role}rating`).textContent = value === null ? "-" : percent(value);
  }
  const score = get("score"), tau = get("threshold");
  const place = x => `${50 + 50 * Math.max(-1, Math.min(1, x))}%`;
  $("score").hidden = score === null;
  $("tau").hidden = tau === null;
  if (score !== null) $("score").style.left = place(score);
  if (tau !== null) $("tau").style.left = place(tau);
  $("numbers").textContent = score === null ? `policy ${get("policy")}` :
    `score ${short(score)} against ${tau === null ? "no threshold" : `threshold ${short(tau)}`} · policy ${get("policy")} · rated in ${Math.round(get("rating-ms"))} ms by ${get("artifact")}`;
}

// ---- the trace of tokens kept

function traced(told) {
  view = told.run?.view ?? null;
  $("tracecard").hidden = !view;
  if (!view) return;
  $("layer").max = view.kept.length - 1;
  picture.onload = draw;
  picture.src = asked;
}
$("layer").oninput = draw;
function draw() {
  const layer = +$("layer").value, kept = new Set(view.kept[layer]), canvas = $("trace"), g = canvas.getContext("2d");
  const [rows, columns] = view.grid;
  canvas.height = Math.round(canvas.width * rows / columns);
  g.imageSmoothingEnabled = false;
  g.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const w = canvas.width / columns, h = canvas.height / rows;
  g.fillStyle = "rgba(14, 18, 26, .8)";
  for (let patch = 0; patch < rows * columns; patch += 1) {
    if (!kept.has(patch)) g.fillRect((patch % columns) * w, Math.floor(patch / columns) * h, w + .5, h + .5);
  }
  $("layerout").textContent = `${layer} of ${view.kept.length - 1}`;
  const said = `Layer ${layer} runs ${kept.size} of ${rows * columns} patches; the others are darkened.`;
  canvas.setAttribute("aria-label", said);
  $("kept").textContent = said;
  const most = Math.max(...view.kv);
  $("kv").replaceChildren(...view.kv.map((bytes, i) => {
    const row = document.createElement("div"), bar = document.createElement("i");
    bar.style.width = `${100 * bytes / most}%`;
    row.append(`layer ${i}`, bar, `${(bytes / 1024).toFixed(1)} KiB`);
    row.setAttribute("aria-current", i === layer);
    return row;
  }));
}

// ---- live curves

const SVG = "http://www.w3.org/2000/svg";
function shape(kind, attributes) {
  const node = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
function plot(id, curves, top, dots = []) {
  const svg = $(id), n = Math.max(2, ...curves.map(c => c.values.length), dots.length);
  svg.setAttribute("viewBox", "0 0 300 92");
  svg.setAttribute("preserveAspectRatio", "none");
  const x = i => 4 + 292 * i / (n - 1), y = v => 86 - 80 * Math.min(1, v / (top || 1));
  const lines = [0, .5, 1].map(v => shape("line", { class: "grid", x1: 0, x2: 300, y1: y(v * top), y2: y(v * top) }));
  const paths = curves.map(c => {
    const points = c.values.map((v, i) => (v === null ? null : `${x(i).toFixed(1)} ${y(v).toFixed(1)}`)).filter(Boolean);
    return shape("path", { class: c.kind, d: points.length ? `M${points.join("L")}` : "" });
  });
  const marks = dots.map((d, i) => shape("ellipse", { class: d.kind, cx: d.at === undefined ? x(i) : 4 + 292 * d.at, cy: y(d.value), rx: 2.5, ry: 2.5 }));
  svg.replaceChildren(...lines, ...paths, ...marks);
}
// The artifact's own curve, and where on it the gateway works.
function worked(curve, share) {
  $("curvecard").hidden = !curve;
  if (!curve) return;
  const at = share ?? 0, place = at * (curve.share.length - 1), low = Math.min(Math.floor(place), curve.share.length - 2);
  const value = curve.accuracy[low] + (place - low) * (curve.accuracy[low + 1] - curve.accuracy[low]);
  const ends = [curve.accuracy[0], curve.accuracy[curve.accuracy.length - 1]];
  plot("curveplot", [{ kind: "a", values: curve.accuracy }, { kind: "b", values: curve.share.map(b => ends[0] + b * (ends[1] - ends[0])) }], 1,
    share === null ? [] : [{ kind: "target", value, at }]);
  $("curvetext").textContent = share === null ? "dashed: random" : `${percent(value)} right with ${percent(share)} on the target; dashed: random`;
  $("curveplot").setAttribute("aria-label", $("curvetext").textContent);
}
function curves(s) {
  const recent = s.recent, asked = s.budget;
  const share = recent.length ? recent[recent.length - 1].share : null;
  plot("shareplot", [{ kind: "a", values: recent.map(r => r.share) }, ...(asked === null ? [] : [{ kind: "b", values: recent.map(() => asked) }])], 1);
  $("sharetext").textContent = recent.length ? `${percent(share)} of rated queries${asked === null ? "" : `, asked ${percent(asked)}`}` : "no query yet";
  $("shareplot").setAttribute("aria-label", $("sharetext").textContent);
  worked(s.curve, share ?? asked);
  const costs = recent.map(r => r.cost), unit = s.cost.unit;
  plot("costplot", [{ kind: "a", values: costs.map(c => c.cost) }, { kind: "b", values: costs.map(c => c.always_target) }], Math.max(1e-12, s.cost.cost, s.cost.always_target));
  $("costtext").textContent = unit ? `${s.cost.cost.toPrecision(3)} ${unit}, ${percent(s.cost.cost / s.cost.always_target)} of always asking the target`
    : recent.length ? "unknown: give both models prices (price_in, price_out)" : "no query yet";
  $("costplot").setAttribute("aria-label", $("costtext").textContent);
  const times = recent.filter(r => r.outcome === "ok"), most = Math.max(1, ...times.map(r => r.total_ms));
  plot("timeplot", [], most, times.map(r => ({ kind: r.route, value: r.total_ms })));
  const median = role => { const t = times.filter(r => r.route === role).map(r => r.total_ms).sort((a, b) => a - b); return t.length ? `${role} ${Math.round(t[t.length >> 1])} ms` : ""; };
  $("timetext").textContent = times.length ? `median: ${[median("draft"), median("target")].filter(Boolean).join(", ")}` : "no query yet";
  $("timeplot").setAttribute("aria-label", $("timetext").textContent);
  $("recent").replaceChildren(...recent.slice(-8).reverse().map(r => {
    const row = document.createElement("tr");
    for (const [text, kind] of [[r.route, r.route], [r.reason, ""], [short(r.score), ""], [Math.round(r.total_ms), ""]]) {
      const cell = row.insertCell();
      cell.textContent = text; cell.className = kind;
    }
    return row;
  }));
}
async function refresh() {
  try {
    const reply = await fetch("stats", { headers: headers() });
    $("keybox").hidden = reply.ok && !$("key").value;
    if (!reply.ok) { $("models").textContent = "a key is needed"; return; }
    const s = await reply.json();
    $("models").textContent = `${s.draft} rates and answers, ${s.target} where it pays · ${s.mode}, ${s.policy}`;
    $("examples").hidden = !s.examples;
    if (firstStats && s.budget !== null) { $("budget").value = 100 * s.budget; $("budgetout").textContent = percent(s.budget); }
    firstStats = false;
    curves(s);
  } catch { $("models").textContent = "the gateway does not answer"; }
}
$("key").onchange = refresh;
$("keybox").onsubmit = e => { e.preventDefault(); refresh(); };
setInterval(() => { if (!document.hidden) refresh(); }, 2000);
refresh();

// Draws the report from the JSON in #data (see page_data in page.py).
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const colourOf = (name) => `var(--${name})`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function shape(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function swatch(text, colour) {
  const item = element("li", {}, text);
  item.style.setProperty("--colour", colourOf(colour));
  return item;
}

function part(size, colour) {
  const made = element("span");
  made.style.flexGrow = size;
  made.style.setProperty("--colour", colourOf(colour));
  return made;
}

const seconds = (value) => `${value >= 100 ? value.toFixed(0) : Number(value.toPrecision(3))} s`;

// Which of `count` parts of an element, from left to right, a pointer is at.
function partAt(event, count) {
  const box = event.currentTarget.getBoundingClientRect();
  return Math.max(0, Math.min(count - 1, Math.floor(((event.clientX - box.left) / box.width) * count)));
}

// ---- Pictures ----------------------------------------------------------------------------------------------------

const sheets = {};
const TOKEN_COLOURS = ["generative", "margin", "active", "cached", "left-out"];
const frameSlider = find("frame");
const wipeSlider = find("wipe");
const latentOf = data.plan.latent_of;
let timer = null;

function drawSheet(canvas, name, frame, from = 0) {
  const { width, height, columns } = data;
  const left = Math.round(from * width);
  const x = (frame % columns) * width, y = Math.floor(frame / columns) * height;
  if (left < width) {
    canvas.getContext("2d").drawImage(sheets[name], x + left, y, width - left, height, left, 0, width - left, height);
  }
}

function drawTokens(canvas, frame) {
  const { height, width, tokens } = data.plan;
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const colours = TOKEN_COLOURS.map((name) => style.getPropertyValue(`--${name}`));
  const x = (column) => Math.round((column * canvas.width) / width); // between whole pixels there would be seams
  const y = (row) => Math.round((row * canvas.height) / height);
  context.globalCompositeOperation = "saturation"; // the only colours are those of tokens
  context.fillStyle = "black";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "source-over";
  context.globalAlpha = 0.6;
  [...tokens[latentOf[frame]]].forEach((role, token) => {
    context.fillStyle = colours[role];
    const column = token % width, row = Math.floor(token / width);
    context.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
  });
  context.globalAlpha = 1;
}

const DRAW = {
  input: (canvas, frame) => { drawSheet(canvas, "input", frame); drawSheet(canvas, "mask", frame); },
  uncached: (canvas, frame) => drawSheet(canvas, "uncached", frame),
  cached: (canvas, frame) => drawSheet(canvas, "cached", frame),
  difference: (canvas, frame) => drawSheet(canvas, "difference", frame),
  wipe: (canvas, frame) => {
    drawSheet(canvas, "uncached", frame);
    drawSheet(canvas, "cached", frame, wipeSlider.value / 100);
  },
  plan: (canvas, frame) => {
    drawSheet(canvas, "input", frame);
    if (find("show-tokens").checked) drawTokens(canvas, frame);
  },
};

const shown = [...document.querySelectorAll("canvas")].filter((canvas) => {
  const needsBoth = ["uncached", "difference", "wipe"].includes(canvas.dataset.shows);
  return data.psnr || !needsBoth;
});

const currentFrame = () => Number(frameSlider.value);

function drawPictures() {
  for (const canvas of shown) DRAW[canvas.dataset.shows](canvas, currentFrame());
  find("wipe-line").style.left = `${wipeSlider.value}%`;
}

function showFrame(frame) {
  frameSlider.value = frame;
  drawPictures();
  const text = `${frame + 1} of ${data.frames}`;
  find("frame-now").textContent = text;
  frameSlider.setAttribute("aria-valuetext", `frame ${text}`);
  showTokens(frame);
  if (data.psnr) showPsnr(frame);
}

function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => showFrame((currentFrame() + 1) % data.frames), 1000 / data.fps) : null;
  find("play").textContent = on ? "Pause" : "Play";
}

function setUpPictures() {
  for (const canvas of shown) Object.assign(canvas, { width: data.width, height: data.height });
  frameSlider.max = data.frames - 1;
  frameSlider.addEventListener("input", () => { play(false); showFrame(currentFrame()); });
  find("play").addEventListener("click", () => play(timer === null));
  find("show-tokens").addEventListener("change", drawPictures);
  wipeSlider.addEventListener("input", drawPictures);
  const drag = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    wipeSlider.value = partAt(event, 101);
    drawPictures();
  };
  for (const kind of ["pointerdown", "pointermove"]) find("wipe-picture").addEventListener(kind, drag);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPictures);
  const size = `${data.width} x ${data.height}`;
  const small = data.full_size ? "" : `, shown at ${size}`;
  find("quality").textContent = data.exact
    ? "The pictures are stored without loss."
    : `The pictures are compressed${small}. Differences and figures are of the exact results.`;
}

// ---- Where and when the results differ -----------------------------------------------------------------------------

const inWords = (value) => ({ identical: "identical", empty: "no mask here" })[value] ?? `${value.toFixed(1)} dB`;
const across = (frame) => ((frame + 0.5) / data.frames) * 100;
let cursor = null;

function setUpDifference() {
  const { top, largest, colours } = data.difference;
  find("difference-scale").style.background = `linear-gradient(to right, ${colours.join(", ")})`;
  find("difference-top").textContent = largest > top ? `${top} and more` : top;
}

// Frames that are identical, or have no mask, have no finite PSNR: the line has a gap there.
function drawLine(svg, values, height, name) {
  const runs = [[]];
  values.forEach((value, frame) => {
    if (typeof value === "number") runs.at(-1).push(`${across(frame)},${height(value)}`);
    else runs.push([]);
  });
  for (const run of runs.filter((run) => run.length)) {
    const points = run.length === 1 ? [...run, run[0]] : run;
    svg.append(shape("polyline", { points: points.join(" "), class: name, "stroke-linecap": "round" }));
  }
}

function setUpPsnr() {
  const chart = find("psnr");
  const numbers = [...data.psnr.mask, ...data.psnr.whole].filter((value) => typeof value === "number");
  if (!numbers.length) {
    chart.replaceWith(element("p", {}, "The two results are identical in every frame."));
    return;
  }
  const step = Math.max(...numbers) - Math.min(...numbers) > 25 ? 10 : 5;
  const low = Math.floor((Math.min(...numbers) - 1) / step) * step;
  const high = Math.ceil((Math.max(...numbers) + 1) / step) * step;
  const height = (value) => ((high - value) / (high - low)) * 100;
  const svg = shape("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  for (let value = low; value <= high; value += step) {
    svg.append(shape("line", { x1: 0, x2: 100, y1: height(value), y2: height(value), class: "grid" }));
    const tick = element("span", { className: "tick" }, String(value));
    tick.style.top = `${height(value)}%`;
    chart.append(tick);
  }
  drawLine(svg, data.psnr.whole, height, "line-whole");
  drawLine(svg, data.psnr.mask, height, "line-mask");
  cursor = shape("line", { y1: 0, y2: 100, class: "cursor" });
  svg.append(cursor);
  chart.append(svg);
  chart.addEventListener("click", (event) => { play(false); showFrame(partAt(event, data.frames)); });
  const range = (values) => {
    const finite = values.filter((value) => typeof value === "number");
    return finite.length ? `${Math.min(...finite)} to ${Math.max(...finite)} dB` : "identical";
  };
  const ranges = `in the mask ${range(data.psnr.mask)}, whole frame ${range(data.psnr.whole)}`;
  chart.setAttribute("aria-label", `PSNR over the frames: ${ranges}`);
}

function showPsnr(frame) {
  const { mask, whole } = data.psnr;
  const values = `in the mask ${inWords(mask[frame])}, whole ${inWords(whole[frame])}`;
  find("psnr-now").textContent = `frame ${frame + 1}: ${values}`;
  if (!cursor) return;
  cursor.setAttribute("x1", across(frame));
  cursor.setAttribute("x2", across(frame));
}

// ---- Plan ----------------------------------------------------------------------------------------------------------

const { tokens, roles, num_active_roles: numActive } = data.plan;
const counts = tokens.map((frame) => roles.map((_, role) => [...frame].filter((c) => Number(c) === role).length));

function setUpPlan() {
  const chart = find("tokens-chart");
  counts.forEach((count) => {
    chart.append(element("span", {}, ...count.map((number, role) => part(number, TOKEN_COLOURS[role]))));
  });
  chart.addEventListener("click", (event) => {
    const frame = latentOf.indexOf(partAt(event, tokens.length));
    if (frame >= 0) { play(false); showFrame(frame); }
  });
  const active = counts.map((count) => count.slice(0, numActive).reduce((a, b) => a + b));
  chart.setAttribute("aria-label", `Active tokens of each latent frame: ${active.join(", ")}, of ${tokens[0].length}`);
  if (data.plan.changes) {
    find("tokens-change").textContent =
      "FULL steps choose the active context anew. This is the choice that they start from.";
  }
}

function showTokens(frame) {
  const latent = latentOf[frame];
  find("latent-now").textContent = data.frames > 1 ? `Latent frame ${latent + 1} of ${tokens.length}:` : "Tokens:";
  const items = roles.map((name, role) => swatch(`${name}: ${counts[latent][role]}`, TOKEN_COLOURS[role]));
  find("token-legend").replaceChildren(...items.filter((_, role) => counts.some((count) => count[role])));
  [...find("tokens-chart").children].forEach((column, number) => column.classList.toggle("now", number === latent));
}

// ---- Steps ---------------------------------------------------------------------------------------------------------

const KINDS = ["FULL", "PARTIAL", "REUSE"];
const { calls, median_seconds: medianSeconds, uncached_call_seconds: uncachedCall } = data;
const branches = Math.max(...calls.map((step) => step.length));
const stepSlider = find("step");

function addTotal(name, parts, scale) {
  const total = parts.reduce((sum, [value]) => sum + value, 0);
  const bar = element("div", { className: "bar" });
  for (const [value, colour] of parts) {
    const made = part(0, colour);
    // A quarter of the width is left for the number behind the longest bar.
    made.style.width = `${(value / scale) * 75}%`;
    bar.append(made);
  }
  bar.append(element("span", { className: "seconds" }, seconds(total)));
  find("totals").append(element("span", {}, name), bar);
}

function setUpTotals() {
  const { hetcache, compiled, eager } = data.seconds;
  const scale = Math.max(hetcache, compiled ?? 0, eager ?? 0);
  if (eager !== undefined) addTotal("eager", [[eager, "quiet"]], scale);
  if (compiled !== undefined) addTotal("uncached", [[compiled, "quiet"]], scale);
  const kindsRun = KINDS.filter((kind) => data.steps[kind]);
  // A graph that was refused ran plainly: the session counted nothing.
  const parts = kindsRun.map((kind) => [data.steps[kind] * medianSeconds[kind], kind.toLowerCase()]);
  addTotal("cached", parts.length ? parts : [[hetcache, "full"]], scale);
  find("kind-legend").append(...kindsRun.map((kind) =>
    swatch(`${kind}: ${data.steps[kind]} calls of ${seconds(medianSeconds[kind])}`, kind.toLowerCase())));
}

function setUpCalls() {
  const longest = Math.max(uncachedCall ?? 0, ...calls.flat().map((call) => call.seconds));
  for (let branch = 0; branch < branches; branch += 1) {
    const letters = calls.map((step) => step[branch]?.kind[0] ?? "").join("");
    const row = element("div", { className: "row" });
    row.setAttribute("role", "img");
    const name = branches > 1 ? `Call ${branch + 1} of each step` : "Call of each step";
    row.setAttribute("aria-label", `${name}: ${letters}`);
    for (const step of calls) {
      const call = step[branch];
      const bar = element("span", { className: "call" });
      if (call) {
        bar.style.height = `${(call.seconds / longest) * 100}%`;
        bar.style.setProperty("--colour", colourOf(call.kind.toLowerCase()));
      }
      row.append(bar);
    }
    if (uncachedCall !== null) {
      const line = element("span", { className: "uncached" });
      line.style.bottom = `${(uncachedCall / longest) * 100}%`;
      row.append(line);
    }
    row.addEventListener("click", (event) => showStep(partAt(event, calls.length)));
    const dashed = uncachedCall === null ? "" : `; dashed: uncached call, ${seconds(uncachedCall)}`;
    const note = element("span", { className: "quiet" }, `full height: ${seconds(longest)}${dashed}`);
    find("calls").append(element("p", { className: "row-title" }, element("span", {}, name), note), row);
  }
  if (branches > 1) {
    find("branches").textContent =
      "Guidance calls the model more than once in each step: with the prompt, and without it. " +
      "Each call has a cache of its own.";
  }
  stepSlider.max = calls.length - 1;
  stepSlider.addEventListener("input", () => showStep(Number(stepSlider.value)));
}

function showStep(number) {
  stepSlider.value = number;
  const step = calls[number];
  const each = step.map((call) => `${call.kind} in ${seconds(call.seconds)}`);
  const text = `${number + 1} of ${calls.length}: ${each.join(", ")}`;
  find("step-now").textContent = text;
  stepSlider.setAttribute("aria-valuetext", `step ${text}`);
  for (const row of document.querySelectorAll(".row")) {
    row.querySelectorAll(".call").forEach((bar, place) => bar.classList.toggle("now", place === number));
  }
}

// ---- Start ---------------------------------------------------------------------------------------------------------

async function start() {
  setUpPlan();
  setUpTotals();
  setUpCalls();
  showStep(0);
  await Promise.all(Object.entries(data.sheets).map(async ([name, source]) => {
    sheets[name] = Object.assign(new Image(), { src: source });
    await sheets[name].decode();
  }));
  setUpPictures();
  if (data.psnr) {
    setUpDifference();
    setUpPsnr();
  }
  showFrame(0);
  document.body.dataset.ready = "true"; // for whoever waits for the page, such as a test
}

start();

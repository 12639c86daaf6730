// The page of `python -m advkd demo`: a student in the browser, by onnxruntime-web. No framework, no build.

const $ = (id) => document.getElementById(id);
const count = (shape) => shape.reduce((a, b) => a * b, 1);
const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const FILM = 9; // images of the interpolation that are shown at once
const state = { latents: null, images: null, seed: 0, stage: 0, selected: 0, path: null, playing: 0 };
let about, ort, student, generator;

// ---- files -------------------------------------------------------------------------------------------------------

async function load(file, advice, options) {
  let answer;
  try {
    answer = await fetch(file, options);
  } catch (error) {
    throw new Error(`${file} could not be loaded (${error.message}). ${advice}`);
  }
  if (!answer.ok) throw new Error(`${file} could not be loaded (status ${answer.status}). ${advice}`);
  return answer;
}

const REBUILD = "Build this folder again: python -m advkd demo STUDENT --out FOLDER";

async function loadRuntime({ base, files, version }) {
  if (typeof WebAssembly !== "object") throw new Error("This browser has no WebAssembly, which the student runs on.");
  const own = !base.startsWith("http");
  const advice = own ? REBUILD
    : `This page takes onnxruntime-web ${version} from there; without that host, "make web" and then "python -m advkd demo" bring it along.`;
  // `integrity`: nothing runs but the very files that the page was tested with.
  const get = ([name, integrity]) => load(base + name, advice, { integrity });
  const [code, wasm] = await Promise.all(Object.entries(files).map(get));
  const module = URL.createObjectURL(new Blob([await code.text()], { type: "text/javascript" }));
  ort = await import(module);
  URL.revokeObjectURL(module);
  ort.env.wasm.numThreads = 1; // more need headers that a static host does not send
  ort.env.wasm.wasmBinary = await wasm.arrayBuffer();
}

async function loadModel(name) {
  const model = await (await load(name, REBUILD)).arrayBuffer();
  return ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
}

// ---- the student -------------------------------------------------------------------------------------------------

let queue = Promise.resolve(); // a session answers one call at a time

function run(latents, batch, session = student) {
  const answer = queue.then(() => runNow(latents, batch, session));
  queue = answer.catch(() => {});
  return answer;
}

// Latents (batch, ...latent_shape) to {output: Float32Array (batch, channels, side, side) in [-1, 1]}.
async function runNow(latents, batch, session) {
  const size = count(about.latent_shape);
  if (latents.length !== batch * size) throw new Error(`${batch} latents have ${batch * size} numbers, not ${latents.length}.`);
  const images = {};
  const atOnce = Math.max(1, Math.floor(2 ** 18 / count(about.image_shape))); // a few for large images: the page stays awake
  for (let first = 0; first < batch; first += atOnce) {
    const these = Math.min(atOnce, batch - first);
    const part = latents.slice(first * size, (first + these) * size);
    const made = await session.run({ latent: new ort.Tensor("float32", part, [these, ...about.latent_shape]) });
    for (const name of session.outputNames) {
      const data = made[name].data;
      images[name] ??= new Float32Array((data.length / these) * batch);
      images[name].set(data, (data.length / these) * first);
    }
    if (first + these < batch) await new Promise((resume) => setTimeout(resume));
  }
  return images;
}

// ---- noise: the numbers that torch.Generator().manual_seed gives torch.randn on a CPU ----------------------------

function* mersenneTwister(seed) {
  const words = new Uint32Array(624);
  words[0] = seed;
  for (let i = 1; i < 624; i++) words[i] = Math.imul(1812433253, words[i - 1] ^ (words[i - 1] >>> 30)) + i;
  for (;;) {
    for (let i = 0; i < 624; i++) {
      const y = (words[i] & 0x80000000) | (words[(i + 1) % 624] & 0x7fffffff);
      words[i] = words[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    for (let y of words) {
      y ^= y >>> 11;
      y ^= (y << 7) & 0x9d2c5680;
      y ^= (y << 15) & 0xefc60000;
      yield (y ^ (y >>> 18)) >>> 0;
    }
  }
}

// `size` (a multiple of 16) numbers of a standard normal distribution: Box-Muller in blocks of 16, as torch does it.
function normal(seed, size) {
  const words = mersenneTwister(seed);
  const data = Float32Array.from({ length: size }, () => (words.next().value & 0xffffff) / 2 ** 24);
  for (let block = 0; block < size; block += 16) {
    for (let i = block; i < block + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - data[i]));
      const angle = 2 * Math.PI * data[i + 8];
      data[i] = radius * Math.cos(angle);
      data[i + 8] = radius * Math.sin(angle);
    }
  }
  return data;
}

// The latents of samples 0, 1, ... of a seed, as Python's StudentPipeline makes them; each sample has a stream of its own.
function seededLatents(seed, samples) {
  const [channels, side] = about.image_shape;
  const small = about.latent_shape[1];
  const block = side / small;
  const latents = new Float32Array(samples * count(about.latent_shape));
  for (let sample = 0; sample < samples; sample++) {
    const noise = normal((Math.imul(seed, 1000003) + sample) >>> 0, count(about.image_shape));
    const offset = sample * channels * small * small;
    for (let i = 0; i < noise.length; i++) {
      const [c, y, x] = [Math.floor(i / side / side), Math.floor(i / side) % side, i % side];
      // a block's mean times its side
      latents[offset + (c * small + Math.floor(y / block)) * small + Math.floor(x / block)] += noise[i] / block;
    }
  }
  return latents;
}

// On the great circle from a to b, 0 <= t <= 1.
function slerp(a, b, t) {
  let [ab, aa, bb] = [0, 0, 0];
  a.forEach((x, i) => { ab += x * b[i]; aa += x * x; bb += b[i] * b[i]; });
  const angle = Math.acos(Math.min(1, Math.max(-1, ab / Math.sqrt(aa * bb))));
  const straight = Math.sin(angle) < 1e-6; // the same noise twice
  const [p, q] = straight ? [1 - t, t] : [Math.sin((1 - t) * angle) / Math.sin(angle), Math.sin(t * angle) / Math.sin(angle)];
  return a.map((x, i) => p * x + q * b[i]);
}

// ---- drawing -----------------------------------------------------------------------------------------------------

// Image `index` of `data` (b, channels, side, side) in [-1, 1].
function paint(canvas, data, index, side) {
  const channels = about.image_shape[0];
  const [area, offset] = [side * side, index * channels * side * side];
  const pixels = new ImageData(side, side);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = (data[offset + (c % channels) * area + i] + 1) * 127.5;
    pixels.data[4 * i + 3] = 255;
  }
  canvas.width = canvas.height = side;
  canvas.classList.toggle("smooth", side > 96); // small images show their pixels
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

const head = () => about.heads[state.stage];
const phase = ({ time }) => (time === null ? "the final image" : `t = ${time}`);

function drawGrid() {
  const { output, resolution_px: side } = head();
  [...$("grid").children].forEach((tile, i) => paint(tile.firstChild, state.images[output], i, side));
  $("stage").value = state.stage;
  $("stage-text").textContent = `${head().submodule} · ${side} px · ${head().time === null ? "final" : phase(head())}`;
  $("stage").setAttribute("aria-valuetext", `submodule ${head().submodule}, ${side} pixels, ${phase(head())}`);
  [...$("strip").children].forEach((tile, k) => tile.setAttribute("aria-pressed", k === state.stage));
}

function drawStrip() {
  $("strip-title").textContent = about.heads.length > 1 ? `Sample ${state.selected} through the submodules` : `Sample ${state.selected}`;
  about.heads.forEach(({ output, resolution_px: side }, k) =>
    paint($("strip").children[k].firstChild, state.images[output], state.selected, side));
  [...$("grid").children].forEach((tile, i) => {
    tile.setAttribute("aria-selected", i === state.selected);
    tile.tabIndex = i === state.selected ? 0 : -1;
  });
}

function drawBetween() {
  if (!state.path) return;
  const [side, step] = [about.image_shape[1], Number($("share").value)];
  paint($("between-image"), state.path, step, side);
  const share = `${Math.round((100 * step) / $("share").max)} %`;
  $("share-text").textContent = share;
  $("share").setAttribute("aria-valuetext", share);
}

// ---- what the controls do ----------------------------------------------------------------------------------------

const latent = (i) => state.latents.subarray(i * count(about.latent_shape), (i + 1) * count(about.latent_shape));

async function showSeed(seed) {
  if (!$("seed").reportValidity()) return;
  const ticket = (state.seed = seed);
  busy(true);
  const latents = seed === about.seed ? about.latents : seededLatents(seed, about.count);
  const images = await run(latents, about.count);
  if (ticket !== state.seed) return; // another seed was asked for meanwhile
  Object.assign(state, { latents, images });
  $("command").textContent = `--seed ${seed} --count ${about.count}`;
  drawGrid();
  drawStrip();
  $("demo").hidden = false;
  $("status").hidden = true;
  await findPath();
  busy(false);
}

async function findPath() {
  const ends = [$("from"), $("to")];
  if (!ends.every((end) => end.reportValidity())) return;
  const [a, b] = ends.map((end) => latent(Number(end.value)));
  const steps = Number($("share").max);
  const latents = new Float32Array((steps + 1) * a.length);
  for (let i = 0; i <= steps; i++) latents.set(slerp(a, b, i / steps), i * a.length);
  const ticket = (state.ticket = {});
  $("film").setAttribute("aria-busy", true);
  const { image } = await run(latents, steps + 1);
  if (ticket !== state.ticket) return;
  state.path = image;
  const side = about.image_shape[1];
  paint($("from-image"), image, 0, side);
  paint($("to-image"), image, steps, side);
  [...$("film").children].forEach((canvas, i) => paint(canvas, image, (i * steps) / (FILM - 1), side));
  drawBetween();
  $("film").setAttribute("aria-busy", false);
}

function select(i) {
  state.selected = Math.min(about.count - 1, Math.max(0, i));
  drawStrip();
}

function play() {
  const playing = !state.playing;
  $("play").textContent = playing ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", playing);
  if (!playing) {
    cancelAnimationFrame(state.playing);
    state.playing = 0;
    return;
  }
  const steps = Number($("share").max);
  const start = performance.now() - (2500 * $("share").value) / steps;
  const frame = (now) => {
    const there = Math.max(0, (now - start) / 2500) % 2; // there and back again, 2.5 s each way
    $("share").value = Math.round(steps * (there < 1 ? there : 2 - there));
    drawBetween();
    state.playing = requestAnimationFrame(frame);
  };
  state.playing = requestAnimationFrame(frame);
}

async function measure() {
  const batch = Number($("batch").value);
  $("measure").disabled = true;
  try {
    generator ??= about.generator === about.model ? student : await loadModel(about.generator);
    const latents = seededLatents(about.seed, batch);
    const seconds = [];
    const begin = performance.now();
    while (seconds.length < 4 || (performance.now() - begin < 3000 && seconds.length < 50)) {
      $("speed-text").textContent = `Measuring, run ${seconds.length + 1} …`;
      await new Promise((resume) => setTimeout(resume)); // the text is drawn
      const start = performance.now();
      await run(latents, batch, generator);
      seconds.push((performance.now() - start) / 1000);
    }
    seconds.shift(); // the first run takes longer
    const median = seconds.sort((a, b) => a - b)[seconds.length >> 1];
    const rate = batch / Math.max(median, 1e-4);
    $("speed").textContent = number(rate, rate < 10 ? 1 : 0);
    $("speed-text").textContent =
      `${number(1000 * median, 1)} ms for ${batch} image${batch > 1 ? "s" : ""}: the median of ${seconds.length} runs on this device, ` +
      `one thread of WebAssembly, the student without its training heads (${number(about.generator_parameters)} parameters).`;
  } finally {
    $("measure").disabled = false;
  }
}

// ---- the page ----------------------------------------------------------------------------------------------------

function busy(is) {
  $("grid").setAttribute("aria-busy", is);
}

function problem(error) {
  $("status").hidden = true;
  $("problem").hidden = false;
  $("problem").textContent = error?.message ?? String(error);
  busy(false);
}

function tile(label, role) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "tile";
  button.setAttribute("aria-label", label);
  if (role) button.setAttribute("role", role);
  button.append(document.createElement("canvas"));
  return button;
}

function describe() {
  const [channels, side] = about.image_shape;
  const facts = [
    ["parameters", number(about.parameters)],
    ["submodules", about.submodules],
    ["image", `${side} × ${side}${channels === 3 ? ", RGB" : ""}`],
    ["input", `${about.latent_shape.join(" × ")} noise`],
    ...(about.name ? [["preset", about.name]] : []),
    ...(about.recipe ? [["recipe", about.recipe]] : []),
  ];
  for (const [term, value] of facts) {
    const row = document.createElement("div");
    row.append(document.createElement("dt"), document.createElement("dd"));
    row.firstChild.textContent = term;
    row.lastChild.textContent = value;
    $("facts").append(row);
  }
  const shown = { xt: "the teacher’s noisy state", x0: "the image that the teacher expects" }[about.target] ?? "the teacher’s state";
  $("meaning").textContent = `The head of each submodule imitates ${shown} at the time t (999 is pure noise, 0 the image); the last one makes the image.`;
  const { base, version } = about.runtime;
  const from = base.startsWith("http") ? `from ${new URL(base).host}` : "from this page’s own folder";
  $("footer").textContent = `Runs on onnxruntime-web ${version} (${from}), one thread of WebAssembly. What you do here stays on your device.`;
}

function build() {
  const columns = Math.round(Math.sqrt(about.count));
  $("grid").style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
  for (let i = 0; i < about.count; i++) $("grid").append(tile(`Sample ${i}`, "option"));
  for (const { submodule, resolution_px: side, time } of about.heads) {
    const button = tile(`Submodule ${submodule}, ${side} pixels, ${phase({ time })}`);
    const caption = document.createElement("small");
    caption.append(Object.assign(document.createElement("b"), { textContent: submodule }), ` · ${side} px`, document.createElement("br"),
      time === null ? "final" : `t = ${time}`);
    button.append(caption);
    $("strip").append(button);
  }
  for (let i = 0; i < FILM; i++) $("film").append(document.createElement("canvas"));
  $("stages").hidden = about.heads.length < 2; // the deployable generator has the last head alone
  state.stage = Number(($("stage").max = about.heads.length - 1));
  $("share").max = about.image_shape[1] <= 64 ? 4 * (FILM - 1) : FILM - 1;
  $("from").max = $("to").max = about.count - 1;
  $("seed").value = about.seed;
  for (const batch of about.count === 64 ? [1, 8, 64] : [1, 4, 16]) $("batch").append(new Option(batch));
  $("batch").selectedIndex = about.count === 64 ? 2 : 0;

  const guarded = (action) => (event) => Promise.resolve(action(event)).catch(problem);
  const stage = (k) => { state.stage = k; drawGrid(); };
  const indexOf = (parent, event) => [...parent.children].indexOf(event.target.closest(".tile"));
  $("seed").addEventListener("change", guarded(() => showSeed(Number($("seed").value))));
  $("new").addEventListener("click", guarded(() => {
    $("seed").value = (state.seed + 1) % 2 ** 32;
    return showSeed(Number($("seed").value));
  }));
  $("stage").addEventListener("input", () => stage(Number($("stage").value)));
  $("strip").addEventListener("click", (event) => { const k = indexOf($("strip"), event); if (k >= 0) stage(k); });
  $("grid").addEventListener("click", (event) => { const i = indexOf($("grid"), event); if (i >= 0) select(i); });
  $("grid").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -about.count, End: about.count }[event.key];
    if (!step) return;
    event.preventDefault();
    select(state.selected + step);
    $("grid").children[state.selected].focus();
  });
  for (const end of ["from", "to"]) $(end).addEventListener("change", guarded(findPath));
  $("share").addEventListener("input", () => { if (state.playing) play(); drawBetween(); });
  $("play").addEventListener("click", play);
  $("measure").addEventListener("click", guarded(measure));
}

async function start() {
  about = await (await load("student.json", REBUILD)).json();
  describe();
  $("status").textContent = "Loading the student and onnxruntime-web (14 MB, once) …";
  const latents = load("latents.bin", REBUILD).then((answer) => answer.arrayBuffer());
  latents.catch(() => {}); // it is awaited below, after what is more likely to fail
  await loadRuntime(about.runtime);
  about.latents = new Float32Array(await latents);
  student = await loadModel(about.model);
  build();
  $("status").textContent = `Making the first ${about.count} images …`;
  await showSeed(about.seed);
}

const ready = start();
ready.catch(problem);
window.advkd = { run: (latents, batch) => run(latents, batch), latents: seededLatents, ready };

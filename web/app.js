// The page: a source of frames, the network on them, and what is shown. docs/edge.md describes its use.
import { FrameClock, RateEstimate, trainedInterval } from "./frame_clock.js";
import { StreamModel, threads } from "./stream_model.js";

// Frames whose logits are averaged, as in stream.py, and frames over which speed is stated.
const MEAN_OF = 4;
const SPEED_OF = 100;
const TOP = 5;

const element = (id) => document.getElementById(id);
const video = element("video");
const canvas = new OffscreenCanvas(1, 1);
const context = canvas.getContext("2d", { willReadFrequently: true });

let model = null;
// The loop that runs; a loop that is no longer this one ends.
let playing = null;
// Chooses the frames; null until the source's rate is known.
let clock = null;

// --- Model ------------------------------------------------------------------------------------------------------------

// Load an export from its folder on the server.
async function fetchModel(folder) {
  const [card, bytes] = await Promise.all(["model.json", "model.onnx"].map((name) => fetch(`${folder}/${name}`)));
  if (!card.ok || !bytes.ok) {
    say("no model on the server. Drop model.json and model.onnx of an export here");
    return;
  }
  await useModel(await card.json(), await bytes.arrayBuffer());
}

async function useModel(card, bytes) {
  stop();
  const loaded = await StreamModel.load(card, bytes);
  await model?.release();
  model = loaded;
  const { run, precision, classes, pixels } = card;
  element("model").textContent =
    `${run.name} step ${run.step}: ${run.backbone}, ${precision}, ${pixels.size} px, ${classes.length} classes`;
  element("camera").disabled = false;
  say(precision === "int8" ? "ready; float32 is faster than int8 in browsers" : "ready");
}

// --- Sources ----------------------------------------------------------------------------------------------------------

async function useCamera() {
  stop();
  // More pixels than a network sees cost time only.
  const wanted = { width: { ideal: 640 }, height: { ideal: 480 }, facingMode: "environment" };
  const stream = await navigator.mediaDevices.getUserMedia({ video: wanted });
  video.srcObject = stream;
  await play("camera", stream.getVideoTracks()[0].getSettings().frameRate ?? null);
}

async function useVideoFile(file) {
  stop();
  video.src = URL.createObjectURL(file);
  await play(file.name, null);
}

// Open what the user chose or dropped: a video, or the two files of an export.
async function openFiles(files) {
  const find = (suffix) => files.find((file) => file.name.endsWith(suffix));
  const [card, bytes] = [find(".json"), find(".onnx")];
  if (card && bytes) {
    await useModel(JSON.parse(await card.text()), await bytes.arrayBuffer());
  } else if (card || bytes) {
    throw new Error("one file of an export is missing. Fix: choose model.json and model.onnx together");
  } else if (files.length > 0) {
    await useVideoFile(files[0]);
  }
}

function stop() {
  playing = null;
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  if (video.src) {
    URL.revokeObjectURL(video.src);
    video.removeAttribute("src");
  }
}

// --- The loop ---------------------------------------------------------------------------------------------------------

// Run the network on the source in the video element. `rate`: its frames per second; null: find out.
async function play(name, rate) {
  if (model === null) {
    throw new Error("no model is loaded. Fix: drop model.json and model.onnx of an export here");
  }
  const me = Symbol(name);
  playing = me;
  const isCamera = video.srcObject !== null;
  model.reset();
  element("hint").hidden = true;
  say(`${name}: waiting for frames`);
  await video.play();

  const estimate = new RateEstimate();
  const lastLogits = [];
  const speed = new Speed();
  clock = null;
  for (;;) {
    const { now, metadata } = await nextFrame();
    if (playing !== me) {
      return;
    }
    const timeS = isCamera ? (metadata.captureTime ?? now) / 1000 : metadata.mediaTime;
    rate ??= estimate.add(timeS);
    clock ??= clockFor(name, rate);
    if (!clock?.take(timeS)) {
      continue;
    }
    const started = performance.now();
    const { levels, logits } = await model.run(grab());
    const latencyMs = performance.now() - started;
    if (playing !== me) {
      return;
    }
    lastLogits.push(logits);
    lastLogits.splice(0, lastLogits.length - MEAN_OF);
    speed.add(performance.now(), latencyMs);
    show(softmax(mean(lastLogits)), speed);
    if (speed.frames >= 20 && clock !== null && speed.fps * clock.intervalS < 0.8) {
      say(`${name}: this device is too slow for a frame each ${milliseconds(clock.intervalS)}; predictions suffer`);
    }
    // For other scripts on the page, the test and the benchmark.
    const detail = { timeS, levels, logits, latencyMs, fps: speed.fps };
    document.dispatchEvent(new CustomEvent("frame", { detail }));
  }
}

// Choose by the user's rate, else by the distance that the network was trained for. null: the source's rate is needed first.
function clockFor(name, rate) {
  const chosen = Number(element("rate").value);
  const intervalS = chosen > 0 ? 1 / chosen : trainedInterval(model.card.frames, rate);
  if (!intervalS) {
    return null;
  }
  say(`${name}: the network takes a frame each ${milliseconds(intervalS)}`);
  return new FrameClock(intervalS);
}

// The newest frame: the browser drops those that come while the network computes, so the page never lags behind.
function nextFrame() {
  return new Promise((resolve) => {
    video.requestVideoFrameCallback((now, metadata) => resolve({ now, metadata }));
  });
}

function grab() {
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  context.drawImage(video, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

class Speed {
  #ended = [];
  #latency = [];

  add(endedMs, latencyMs) {
    this.#ended.push(endedMs);
    this.#latency.push(latencyMs);
    this.#ended.splice(0, this.#ended.length - SPEED_OF);
    this.#latency.splice(0, this.#latency.length - SPEED_OF);
  }

  get frames() {
    return this.#ended.length;
  }

  // Frames per second that went through the network, by the clock on the wall.
  get fps() {
    const passedMs = this.#ended.at(-1) - this.#ended[0];
    return passedMs > 0 ? (1000 * (this.#ended.length - 1)) / passedMs : 0;
  }

  latencyMs(quantile) {
    const sorted = [...this.#latency].sort((a, b) => a - b);
    return sorted[Math.floor(quantile * (sorted.length - 1))];
  }
}

// --- What is shown ----------------------------------------------------------------------------------------------------

function mean(rows) {
  return Array.from(rows[0], (_, index) => rows.reduce((sum, row) => sum + row[index], 0) / rows.length);
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

function show(scores, speed) {
  const best = scores.map((score, label) => ({ score, name: model.card.classes[label] }));
  best.sort((a, b) => b.score - a.score);
  const lines = best.slice(0, TOP).map(({ score, name }) => {
    const percent = `${(100 * score).toFixed(1)} %`;
    const line = document.createElement("li");
    line.style.setProperty("--score", percent.replace(" ", ""));
    for (const text of [name, percent]) {
      line.append(Object.assign(document.createElement("span"), { textContent: text }));
    }
    return line;
  });
  element("top").replaceChildren(...lines);
  element("fps").textContent = `${speed.fps.toFixed(1)} frames/s`;
  element("median").textContent = `${speed.latencyMs(0.5).toFixed(1)} ms`;
  element("p95").textContent = `${speed.latencyMs(0.95).toFixed(1)} ms`;
}

function milliseconds(timeS) {
  return `${(1000 * timeS).toFixed(0)} ms`;
}

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

// Run an action of the user; show what went wrong.
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    // AbortError: another source was chosen meanwhile.
    if (error.name !== "AbortError") {
      say(error.message, true);
    }
  }
}

element("threads").textContent = threads;
element("camera").addEventListener("click", () => attempt(useCamera));
element("files").addEventListener("change", ({ target }) => attempt(() => openFiles([...target.files])));
element("rate").addEventListener("change", () => {
  clock = null;
});
video.addEventListener("error", () => video.error && say(`the browser cannot play it: ${video.error.message}`, true));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  attempt(() => openFiles([...event.dataTransfer.files]));
});
await attempt(() => fetchModel(new URLSearchParams(location.search).get("model") ?? "model"));

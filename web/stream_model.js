// An exported stream (export.py format=onnx form=stream) in onnxruntime-web. Its model card says all there is to know.
import * as ort from "onnxruntime-web";

import { normalise, resizeAndCrop } from "./pixels.js";

const SCHEMA = "tsm-model-card/1";

// A page has threads only if its server sends the headers COOP and COEP (tools/serve_web.py does).
ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

export const threads = ort.env.wasm.numThreads;

export class StreamModel {
  // `card`: the object in model.json; `bytes`: an ArrayBuffer with model.onnx.
  static async load(card, bytes) {
    check(card);
    await checkBytes(card, bytes);
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    return new StreamModel(card, session);
  }

  constructor(card, session) {
    this.card = card;
    this.session = session;
    this.reset();
  }

  // Forget all frames so far.
  reset() {
    this.caches = Object.fromEntries(
      this.card.caches.map(({ input, initial }) => {
        const shape = shapeOf(this.card.inputs, input);
        return [input, new ort.Tensor("float32", new Float32Array(elements(shape)).fill(initial), shape)];
      }),
    );
  }

  // Map an ImageData to logits, and carry the caches to the next frame. `levels`: the RGB levels that the network saw.
  async run(image) {
    const levels = resizeAndCrop(image, this.card.pixels);
    const shape = shapeOf(this.card.inputs, this.card.inputs[0].name);
    const frame = new ort.Tensor("float32", normalise(levels, this.card.pixels), shape);
    const outputs = await this.session.run({ [this.card.inputs[0].name]: frame, ...this.caches });
    for (const { input, output } of this.card.caches) {
      this.caches[input] = outputs[output];
    }
    return { levels, logits: outputs[this.card.outputs[0].name].data };
  }

  async release() {
    await this.session.release();
  }
}

// The shape of a tensor for one stream: N is 1.
function shapeOf(tensors, name) {
  return tensors.find((tensor) => tensor.name === name).shape.map((size) => (size === "N" ? 1 : size));
}

function elements(shape) {
  return shape.reduce((a, b) => a * b, 1);
}

function check(card) {
  if (card.schema !== SCHEMA) {
    throw new Error(`model.json is no model card of schema ${SCHEMA}. Fix: export the run again with export.py`);
  }
  if (card.format !== "onnx" || card.form !== "stream") {
    throw new Error(`the model is ${card.format}, ${card.form}. Fix: python export.py RUN format=onnx form=stream`);
  }
  if (card.pixels.colour !== "RGB") {
    throw new Error(`the model's input is ${card.pixels.colour}, and a camera gives RGB. Fix: export a run with model.modality=rgb`);
  }
}

async function checkBytes(card, bytes) {
  // Browsers have digests only on https and localhost, as they have cameras.
  if (!crypto.subtle) {
    return;
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex !== card.files["model.onnx"].sha256) {
    throw new Error("model.onnx is not the file of this model.json. Fix: take both from one export folder");
  }
}

// Pixels as in training: scale the shorter side (bilinear, antialiased), cut out the centre, normalise.

// The target of the card's resize rule for a frame: its scaled size, and the corner of the centre crop.
export function geometry(width, height, { resize, size }) {
  const shorter = resize.shorter_side;
  const scaled =
    width <= height
      ? [shorter, Math.floor((shorter * height) / width)]
      : [Math.floor((shorter * width) / height), shorter];
  return {
    scaledWidth: scaled[0],
    scaledHeight: scaled[1],
    left: roundHalfToEven((scaled[0] - size) / 2),
    top: roundHalfToEven((scaled[1] - size) / 2),
  };
}

// Scale and crop the RGBA levels of an ImageData to RGB levels, size x size x 3.
//
// The filter is Pillow's and torch's: a triangle as wide as the scale, rows first, levels rounded after each pass. A canvas
// that scales by itself uses another filter in each browser. Only what the crop needs is computed.
export function resizeAndCrop({ data, width, height }, pixels) {
  const { size } = pixels;
  const { scaledWidth, scaledHeight, left, top } = geometry(width, height, pixels);
  const columns = filterTaps(width, scaledWidth, left, size);
  const rows = filterTaps(height, scaledHeight, top, size);
  const firstRow = rows[0].first;
  const lastRow = rows[size - 1].first + rows[size - 1].weights.length;

  // Uint8ClampedArray rounds to the nearest level.
  const narrow = new Uint8ClampedArray((lastRow - firstRow) * size * 3);
  let to = 0;
  for (let y = firstRow; y < lastRow; y++) {
    for (const { first, weights } of columns) {
      let red = 0;
      let green = 0;
      let blue = 0;
      let from = (y * width + first) * 4;
      for (const weight of weights) {
        red += weight * data[from];
        green += weight * data[from + 1];
        blue += weight * data[from + 2];
        from += 4;
      }
      narrow[to++] = red;
      narrow[to++] = green;
      narrow[to++] = blue;
    }
  }

  const levels = new Uint8ClampedArray(size * size * 3);
  const stride = size * 3;
  rows.forEach(({ first, weights }, y) => {
    for (let x = 0; x < stride; x++) {
      let sum = 0;
      let from = (first - firstRow) * stride + x;
      for (const weight of weights) {
        sum += weight * narrow[from];
        from += stride;
      }
      levels[y * stride + x] = sum;
    }
  });
  return levels;
}

// Turn RGB levels (height, width, 3) into the network's input (3, height, width).
export function normalise(levels, { mean, std }) {
  const area = levels.length / 3;
  const input = new Float32Array(levels.length);
  for (let channel = 0; channel < 3; channel++) {
    for (let at = 0; at < area; at++) {
      input[channel * area + at] = (levels[3 * at + channel] - mean[channel]) / std[channel];
    }
  }
  return input;
}

// For each of `count` outputs from `start` on: the first input and the weights, when `from` inputs become `to` outputs.
function filterTaps(from, to, start, count) {
  const scale = from / to;
  const reach = Math.max(scale, 1);
  return Array.from({ length: count }, (_, index) => {
    const centre = (start + index + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - reach + 0.5));
    const end = Math.min(from, Math.floor(centre + reach + 0.5));
    const weights = Float64Array.from({ length: end - first }, (_, tap) =>
      Math.max(0, 1 - Math.abs(first + tap + 0.5 - centre) / reach),
    );
    const sum = weights.reduce((a, b) => a + b);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

function roundHalfToEven(value) {
  const rounded = Math.round(value);
  return rounded - value === 0.5 && rounded % 2 !== 0 ? rounded - 1 : rounded;
}

// Which frames of a source the network takes: by their times, so that they are as far apart as in training.

// Frames between two of the network's, where training fixed none: as in stream.py.
const USUAL_DISTANCE = 2;

// Seconds between two frames of the network, by the `frames` of its model card. Cards without the training videos' rate leave it
// to the source's, and null while that is not known. The rule of training/deploy/frame_interval.py.
export function trainedInterval(frames, rate) {
  return frames.interval_s ?? (rate ? trainedDistance(frames) / rate : null);
}

// The distance in frames that the network was trained for: the median of the model card's.
export function trainedDistance(frames) {
  if (!frames.distances) {
    return USUAL_DISTANCE;
  }
  const sorted = [...frames.distances].sort((a, b) => a - b);
  const middle = sorted.length / 2;
  return sorted.length % 2 ? sorted[Math.floor(middle)] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// Takes the frame nearest to each due time, without holding a frame back. The rules of pipelines/stream/frame_clock.py.
export class FrameClock {
  constructor(intervalS) {
    this.intervalS = intervalS;
    this.dueS = null;
    this.lastS = 0;
  }

  // Tell whether to take the frame of this time.
  take(timeS) {
    const gapS = timeS - this.lastS;
    this.lastS = timeS;
    if (this.dueS === null || gapS < 0) {
      // The first frame, or a source that has begun again.
      this.dueS = timeS + this.intervalS;
      return true;
    }
    if (timeS + gapS / 2 < this.dueS) {
      return false;
    }
    // Due times that have passed are left out.
    const passed = Math.max(0, Math.round((timeS - this.dueS) / this.intervalS));
    this.dueS += (passed + 1) * this.intervalS;
    return true;
  }
}

// Estimates a video file's frame rate, which browsers do not state, from the times of its first frames.
export class RateEstimate {
  #timesS = [];

  // Return frames per second, or null until there are `enough` times.
  add(timeS, enough = 10) {
    if (timeS > (this.#timesS.at(-1) ?? -Infinity)) {
      this.#timesS.push(timeS);
    }
    if (this.#timesS.length < enough) {
      return null;
    }
    const gapsS = this.#timesS.slice(1).map((each, index) => each - this.#timesS[index]);
    // A gap in which the browser dropped frames is a multiple of the shortest one. The mean of all: times are rounded.
    const shortestS = Math.min(...gapsS);
    const frames = gapsS.reduce((sum, gapS) => sum + Math.round(gapS / shortestS), 0);
    return frames / (this.#timesS.at(-1) - this.#timesS[0]);
  }
}

// Asynchronous work of which only the latest result matters.

const ABORT_AFTER = 250; // ms: a newer value aborts a request that has been running for longer than this

/** Runs one task at a time: starting a task aborts the one before it. */
export class LatestTask {
  /** The result of `work(signal)`. Undefined if a newer task or a call of `stop` aborted the work. */
  async run(work) {
    this.stop();
    const controller = new AbortController();
    this.controller = controller;
    try {
      const result = await work(controller.signal);
      return controller.signal.aborted ? undefined : result;
    } catch (error) {
      if (controller.signal.aborted) return undefined;
      throw error;
    }
  }

  stop() {
    this.controller?.abort();
  }
}

/**
 * Calls `work(signal, value)` for a value that changes faster than the work takes, such as the pointer's position.
 * One call runs at a time. While it runs, only the newest value is kept for the next call.
 */
export class ThrottledTask extends LatestTask {
  constructor(work) {
    super();
    this.work = work;
    this.isRunning = false;
    this.pending = null;
  }

  update(value) {
    this.pending = { value };
    const isLate = this.isRunning && performance.now() - this.startedAt > ABORT_AFTER;
    if (isLate) this.stop();
    if (!this.isRunning) this.runPending();
  }

  async runPending() {
    const { value } = this.pending;
    this.pending = null;
    this.isRunning = true;
    this.startedAt = performance.now();
    await this.run((signal) => this.work(signal, value));
    this.isRunning = false;
    if (this.pending) this.runPending();
  }
}

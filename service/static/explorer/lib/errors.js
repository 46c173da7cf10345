// Errors whose message is meant for the user.

/** An error with a message for the user and, where a request failed, its error code and request id. */
export class UserError extends Error {
  constructor(message, code = "", requestId = "") {
    super(message);
    this.code = code;
    this.requestId = requestId;
  }
}

export const isAbort = (error) => error.name === "AbortError";

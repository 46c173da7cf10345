// The API key that the user has typed. It is kept for this tab only, and sent with each request.

const STORAGE_NAME = "elbo-api-key";
export const KEY_ERRORS = ["unauthorized", "forbidden"];

export const apiKey = {
  get: () => sessionStorage.getItem(STORAGE_NAME),
  set: (value) => sessionStorage.setItem(STORAGE_NAME, value),
  forget: () => sessionStorage.removeItem(STORAGE_NAME),
};

/** `headers` with the key, if there is one. */
export function withKey(headers = {}) {
  const key = apiKey.get();
  return key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
}

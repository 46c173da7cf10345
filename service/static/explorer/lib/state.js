// The page's state, kept in the address so that a view can be shared and the back button works.

const WRITE_DELAY = 300; // ms: browsers rate-limit history.replaceState
const SHARED_BY_ALL_VIEWS = ["view", "model"];
let current = new URLSearchParams(location.search);
let timer;

export const state = {
  get: (name, fallback = null) => current.get(name) ?? fallback,

  number(name, fallback) {
    const value = Number.parseFloat(current.get(name));
    return Number.isFinite(value) ? value : fallback;
  },

  /** A comma-separated list of numbers, or null. If `count` is given, a list of another length gives null. */
  numbers(name, count = null) {
    const text = current.get(name);
    if (!text) return null;
    const values = text.split(",").map(Number);
    if (!values.every(Number.isFinite)) return null;
    return count === null || values.length === count ? values : null;
  },

  /** Replace the given values in the current history entry; null or "" removes a value. */
  set(values) {
    for (const [name, value] of Object.entries(values)) {
      if (value === null || value === "") current.delete(name);
      else current.set(name, value);
    }
    clearTimeout(timer);
    timer = setTimeout(() => history.replaceState(null, "", address()), WRITE_DELAY);
  },

  /** Add a history entry for another view or model, without the parameters of the previous view. */
  push(values) {
    clearTimeout(timer);
    history.replaceState(null, "", address());
    const next = new URLSearchParams();
    for (const name of SHARED_BY_ALL_VIEWS) {
      if (current.has(name)) next.set(name, current.get(name));
    }
    for (const [name, value] of Object.entries(values)) next.set(name, value);
    current = next;
    history.pushState(null, "", address());
  },

  /** Read the state from the address, after the browser went back or forward. */
  reload() {
    clearTimeout(timer);
    current = new URLSearchParams(location.search);
  },
};

const address = () => (current.size ? `?${current.toString().replaceAll("%2C", ",")}` : location.pathname);

/** Numbers in the format of the address. */
export const toParameter = (values) => Array.from(values, (v) => Number(v.toFixed(3))).join(",");

// What is looked at, kept in the address, so that a view can be shared and the way back leads back.

const WAIT = 300; // ms: browsers refuse an address that changes with every move of the pointer
const OF_ALL = ["view", "model"];
let current = new URLSearchParams(location.search);
let timer;

export const state = {
  get: (name, fallback = null) => current.get(name) ?? fallback,
  number(name, fallback) {
    const value = Number.parseFloat(current.get(name));
    return Number.isFinite(value) ? value : fallback;
  },
  numbers(name) {
    const values = (current.get(name) ?? "").split(",").map(Number);
    return current.get(name) && values.every(Number.isFinite) ? values : null;
  },
  /** Sets what is given; null removes. */
  set(values) {
    for (const [name, value] of Object.entries(values)) {
      if (value === null || value === "") current.delete(name);
      else current.set(name, value);
    }
    clearTimeout(timer);
    timer = setTimeout(() => history.replaceState(null, "", address()), WAIT);
  },
  /** Another view: a step that the back button undoes. What belonged to the last view goes. */
  go(values) {
    clearTimeout(timer);
    history.replaceState(null, "", address());
    const kept = new URLSearchParams();
    for (const name of OF_ALL) if (current.has(name)) kept.set(name, current.get(name));
    for (const [name, value] of Object.entries(values)) kept.set(name, value);
    current = kept;
    history.pushState(null, "", address());
  },
  read() {
    clearTimeout(timer);
    current = new URLSearchParams(location.search);
  },
};

const address = () => (current.size ? `?${current.toString().replaceAll("%2C", ",")}` : location.pathname);
export const rounded = (z) => Array.from(z, (v) => Number(v.toFixed(3))).join(",");

// The button that switches between the light and the dark theme.

import { isDark } from "./ui/colours.js";

const STORAGE_KEY = "theme";
const button = document.getElementById("theme");

/** Apply the stored theme or, if none is stored, the system's theme. Make the button switch the theme. */
export function initTheme() {
  applyTheme(localStorage.getItem(STORAGE_KEY));
  button.addEventListener("click", () => {
    const next = isDark() ? "light" : "dark";
    localStorage.setItem(STORAGE_KEY, next);
    applyTheme(next);
  });
  const systemTheme = matchMedia("(prefers-color-scheme: dark)");
  systemTheme.addEventListener("change", () => applyTheme(localStorage.getItem(STORAGE_KEY)));
}

/** Use `theme` ("light", "dark", or null: the system's) and repaint the canvases, because CSS cannot change them. */
function applyTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", `switch to ${isDark() ? "light" : "dark"} colours`);
  for (const canvas of document.querySelectorAll("canvas")) canvas.repaint?.();
}

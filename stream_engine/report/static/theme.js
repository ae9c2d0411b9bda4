"use strict";
// Light, dark, or as the system says; kept for the next visit where the browser allows it.
(() => {
  const kinds = { "": "Auto", light: "Light", dark: "Dark" };
  const names = { "": "as the system", light: "light", dark: "dark" };
  let kind = "";
  try {
    kind = localStorage.getItem("stream-engine-theme") || "";
  } catch {
    // no storage: as the system says
  }
  const apply = () => {
    if (!(kind in kinds)) kind = "";
    document.documentElement.dataset.theme = kind;
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = kinds[kind];
      button.setAttribute("aria-label", `Colours: ${names[kind]}`);
    }
  };
  apply();
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      const order = Object.keys(kinds);
      kind = order[(order.indexOf(kind) + 1) % order.length];
      try {
        localStorage.setItem("stream-engine-theme", kind);
      } catch {
        // this visit only
      }
      apply();
    });
  });
})();

"use strict";
// The filter of the examples: hides what does not fit; without a script everything is shown.
(function () {
  const form = document.getElementById("filters");
  const field = (name) => document.getElementById("filter-" + name);
  const examples = Array.from(document.querySelectorAll("#examples [data-iou]"));
  const galleries = Array.from(document.querySelectorAll(".gallery"));
  const shown = document.getElementById("shown");

  // An empty or unfinished number sets no bound.
  function bound(name, otherwise) {
    const value = field(name).valueAsNumber;
    return Number.isNaN(value) ? otherwise : value;
  }

  function choice(name) {
    const select = field(name);
    return select ? select.value : "";
  }

  function update() {
    const words = field("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = choice("kind"), count = choice("count"), target = choice("target");
    const low = bound("low", -Infinity), high = bound("high", Infinity);
    for (const example of examples) {
      const data = example.dataset, iou = Number(data.iou);
      example.hidden = !(
        words.every((word) => data.search.includes(word)) &&
        (!kind || data.kind === kind) && (!count || data.count === count) && (!target || data.target === target) &&
        iou >= low && iou <= high
      );
    }
    for (const gallery of galleries) {
      const nothing = gallery.querySelector(".nothing");
      if (nothing) nothing.hidden = gallery.querySelector(".card:not([hidden])") !== null;
    }
    const lines = document.querySelectorAll("#all tbody tr");
    const visible = document.querySelectorAll("#all tbody tr:not([hidden])");
    shown.textContent = visible.length + " of " + lines.length + " instructions";
  }

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));  // after the fields have their values back
  update();
})();

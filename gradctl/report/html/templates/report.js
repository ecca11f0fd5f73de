"use strict";
// All that this does can be done without it: folds open by hand, and each node has its text as a title.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
addEventListener("hashchange", () => {
  const fold = document.getElementById(location.hash.slice(1))?.closest("details");
  if (fold) { fold.open = true; fold.scrollIntoView(); }
});
for (const graph of document.querySelectorAll(".graph")) {
  const said = graph.querySelector(".details");
  const point = (event) => {
    const node = event.target.closest(".node");
    if (!node) return;
    graph.querySelectorAll(".twin").forEach((each) => each.classList.remove("twin"));
    said.textContent = node.getAttribute("aria-label");
    document.getElementById(node.dataset.twin)?.classList.add("twin");
  };
  graph.addEventListener("focusin", point);
  graph.addEventListener("pointerover", point);
}

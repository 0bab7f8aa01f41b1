"use strict";
// The label on the drawing says what its root title says; without the root title, a mark's own title can be shown.
document.querySelectorAll("svg[role=img] > title").forEach((title) => title.remove());

const tip = document.getElementById("tip");
function textOf(target) {
  const holder = target.closest("[data-tip], svg :has(> title), [data-title]");
  if (!holder) return "";
  const title = holder.querySelector(":scope > title");
  if (title) { holder.dataset.title = title.textContent; title.remove(); }
  return holder.dataset.tip || holder.dataset.title || "";
}
function show(event) {
  const text = event.target instanceof Element ? textOf(event.target) : "";
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 6)) + "px";
  tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18) + "px";
}
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

document.querySelectorAll("svg.graph").forEach((graph) => {
  const edges = [...graph.querySelectorAll(".edge")];
  graph.querySelectorAll(".node").forEach((node) => {
    node.addEventListener("pointerenter", () => {
      graph.classList.add("lit");
      edges.forEach((edge) => edge.classList.toggle("on", edge.dataset.ends.split(" ").includes(node.dataset.node)));
    });
    node.addEventListener("pointerleave", () => graph.classList.remove("lit"));
  });
});

// Without this script all deciles stand one below the other.
document.querySelectorAll("[data-tabs]").forEach((group) => {
  const panels = [...group.querySelectorAll("[data-tab]")];
  if (panels.length < 2) return;
  const bar = document.createElement("div");
  bar.className = "tabs";
  bar.setAttribute("role", "tablist");
  bar.setAttribute("aria-label", "Decile of activation");
  const buttons = panels.map((panel) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("role", "tab");
    button.textContent = panel.dataset.tab;
    button.style.setProperty("--strength", Number(panel.dataset.tab) / 10);
    panel.setAttribute("role", "tabpanel");
    bar.append(button);
    return button;
  });
  const select = (chosen) => panels.forEach((panel, i) => {
    panel.hidden = i !== chosen;
    buttons[i].setAttribute("aria-selected", String(i === chosen));
    buttons[i].tabIndex = i === chosen ? 0 : -1;
  });
  buttons.forEach((button, i) => {
    button.addEventListener("click", () => select(i));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = (i + step + panels.length) % panels.length;
      select(next);
      buttons[next].focus();
    });
  });
  group.prepend(bar);
  select(0);
});

"use strict";
// Read-outs of curves. All charts of a group follow one step, so that they can be compared.
function nearest(steps, step) {
  let best = 0;
  for (let i = 1; i < steps.length; i++) if (Math.abs(steps[i] - step) < Math.abs(steps[best] - step)) best = i;
  return best;
}
function show(chart, index) {
  const data = chart.points;
  chart.index = index;
  chart.classList.add("reading");
  const line = chart.querySelector(".cursor line"), dot = chart.querySelector(".cursor circle");
  line.setAttribute("x1", data.x[index]);
  line.setAttribute("x2", data.x[index]);
  dot.setAttribute("cx", data.x[index]);
  dot.setAttribute("cy", data.y[index]);
  chart.querySelector("output").textContent = "step " + data.steps[index].toLocaleString("en") + ": " + data.labels[index];
}
function hide(chart) {
  chart.classList.remove("reading");
  chart.querySelector("output").textContent = chart.last;
}
for (const group of document.querySelectorAll("[data-group]")) {
  const charts = [...group.querySelectorAll(".chart")];
  for (const chart of charts) {
    const svg = chart.querySelector("svg");
    chart.points = JSON.parse(chart.dataset.points);
    chart.last = chart.querySelector("output").textContent;
    const showAll = (index) => {
      const step = chart.points.steps[index];
      for (const other of charts) show(other, other === chart ? index : nearest(other.points.steps, step));
    };
    const hideAll = () => charts.forEach(hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      showAll(nearest(chart.points.x, (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width));
    });
    svg.addEventListener("pointerleave", hideAll);
    svg.addEventListener("blur", hideAll);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const end = chart.points.steps.length - 1;
      showAll(Math.min(end, Math.max(0, chart.classList.contains("reading") ? chart.index + move : end)));
    });
  }
}

// The box under the pointer lights up with all that it needs and all that needs it.
for (const svg of document.querySelectorAll(".graph svg")) {
  const arrows = [...svg.querySelectorAll(".arrow")];
  const reach = (start, from, to) => {
    const names = new Set([start]), lit = [];
    for (const name of names)
      for (const arrow of arrows) if (arrow.dataset[from] === name) { names.add(arrow.dataset[to]); lit.push(arrow); }
    return { names, lit };
  };
  const clear = () => {
    svg.classList.remove("reading");
    svg.querySelectorAll(".lit").forEach((part) => part.classList.remove("lit"));
  };
  for (const box of svg.querySelectorAll(".box")) {
    const light = () => {
      clear();
      svg.classList.add("reading");
      const up = reach(box.dataset.name, "target", "source"), down = reach(box.dataset.name, "source", "target");
      for (const arrow of [...up.lit, ...down.lit]) arrow.classList.add("lit");
      for (const other of svg.querySelectorAll(".box"))
        other.classList.toggle("lit", up.names.has(other.dataset.name) || down.names.has(other.dataset.name));
    };
    box.addEventListener("pointerenter", light);
    box.addEventListener("pointerleave", clear);
  }
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {  // no right to the clipboard: select it, the reader presses the keys
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}

// The contents follow the reader.
const links = [...document.querySelectorAll(".contents a")];
const targets = links.map((link) => document.getElementById(link.hash.slice(1)));
function follow() {
  let at = 0;
  targets.forEach((target, i) => { if (target.getBoundingClientRect().top < innerHeight * 0.3) at = i; });
  if (innerHeight + scrollY >= document.documentElement.scrollHeight - 4) at = targets.length - 1;
  links.forEach((link, i) => {
    link.classList.toggle("here", i === at);
    if (i === at) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
  });
}
addEventListener("scroll", follow, { passive: true });
follow();

addEventListener("beforeprint", () => document.querySelectorAll("details[data-print]").forEach((part) => { part.open = true; }));
document.documentElement.dataset.ready = "yes";  // the tests see that the script ran to its end

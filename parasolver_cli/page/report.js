"use strict";
const NOT_EVALUATED = 255, SVG = "http://www.w3.org/2000/svg";
const stories = JSON.parse(document.getElementById("data").textContent);
const redrawn = [];

function percent(error) {
  if (error < 0.0005) return "less than 0.1 %";
  return (100 * error).toFixed(error < 0.0995 ? 1 : 0) + " %";
}

function colour(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim().slice(1);
  const long = hex.length === 3 ? [...hex].map((one) => one + one).join("") : hex;
  return [0, 2, 4].map((at) => parseInt(long.slice(at, at + 2), 16));
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/* Paths past their obstacles, in rows; the wanted ones dashed. */
function paths(lines, wanted, obstacles) {
  const across = Math.ceil(Math.sqrt(lines.length)), down = Math.ceil(lines.length / across);
  const svg = element("svg", { viewBox: `0 0 ${2.4 * across} ${1.6 * down}`, role: "img" });
  lines.forEach((line, at) => {
    const place = `${2.4 * (at % across) + 1.2} ${1.6 * Math.floor(at / across) + 0.8}`;
    const group = element("g", { transform: `translate(${place}) scale(1 -1)` });
    const [x, y, r] = obstacles[at];
    group.append(element("circle", { cx: x, cy: y, r, fill: "var(--line)" }));
    const drawn = (points, options) => group.append(element("polyline", {
      points: points.map((point) => point.join(",")).join(" "), fill: "none", "stroke-linejoin": "round", ...options,
    }));
    if (wanted) drawn(wanted[at], { stroke: "var(--muted)", "stroke-width": 0.05, "stroke-dasharray": "0.08 0.06" });
    drawn(line, { stroke: "var(--accent)", "stroke-width": 0.04 });
    svg.append(group);
  });
  return svg;
}

function shown(frame, story, wanted, text) {
  if (typeof frame !== "string") {
    const drawing = paths(frame, wanted, story.obstacles);
    drawing.setAttribute("aria-label", text);
    return drawing;
  }
  const image = new Image();
  image.src = frame;
  image.alt = text;
  return image;
}

/* A pixel for each step and round; the style stretches it. */
function draw(canvas, story, levels, current) {
  const rounds = story.own, steps = story.steps, across = Math.max(1, Math.ceil(600 / steps));
  const down = Math.max(1, Math.ceil(240 / rounds));
  canvas.width = steps * across;
  canvas.height = rounds * down;
  const context = canvas.getContext("2d");
  const [small, large] = [colour("--small"), colour("--large")];
  const fill = (parts, row, from, count) => {
    context.fillStyle = `rgb(${parts.join(" ")})`;
    context.fillRect(from * across, row * down, count * across, down);
  };
  for (let row = 0; row < rounds; row++) {
    fill(colour("--none"), row, 0, steps);
    fill(colour("--final"), row, 0, story.front[row]);
    for (let step = 0; step < steps; step++) {
      const level = levels[row * steps + step];
      if (level === NOT_EVALUATED) continue;
      fill(small.map((part, i) => Math.round(part + (large[i] - part) * level / 254)), row, step, 1);
    }
  }
  const row = Math.min(current, rounds) - 1, width = Math.max(2, canvas.height / 120);
  context.lineWidth = width;
  context.strokeStyle = `rgb(${colour("--accent").join(" ")})`;
  context.strokeRect(width / 2, row * down + width / 2, canvas.width - width, Math.max(down - width, 1));
}

function told(story, index) {
  const round = story.shown[index], parts = [`round ${round} of ${story.rounds}`];
  if (story.errors) parts.push(`${percent(story.errors[index])} from the sequential sample`);
  const final = story.front[Math.min(round, story.own) - 1];
  parts.push(`${round >= story.own ? story.steps : final} of ${story.steps} steps final`);
  return parts.join(", ");
}

function build(story) {
  const section = document.getElementById("story").content.cloneNode(true).querySelector("section");
  const find = (what) => section.querySelector(what);
  const levels = Uint8Array.from(atob(story.map), (one) => one.charCodeAt(0));
  const slider = find("input"), wanted = story.pictures.sequential;
  const first = Array.isArray(story.frames[0]) ? "The first path" : "The first picture";
  find("h2").textContent = `${story.name}: ${story.rounds} rounds instead of ${story.steps}`;
  find(".told").textContent = `${first} is final after ${story.own} rounds` +
    (story.own < story.rounds ? `, the slowest of all after ${story.rounds}. ` : ". ") +
    "The error and the map are of the first.";
  slider.max = story.shown.length - 1;
  slider.value = slider.max;
  const show = () => {
    const index = Number(slider.value), text = told(story, index);
    find("output").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    find(".holder").replaceChildren(shown(story.frames[index], story, wanted, `After ${text}`));
    draw(find("canvas"), story, levels, story.shown[index]);
  };
  find(".frame figcaption").textContent = `The first ${Array.isArray(story.frames[0]) ? "paths" : "pictures"} ` +
    "after this round" + (Array.isArray(story.frames[0]) ? "; dashed: the sequential ones." : ".");
  find("canvas").setAttribute("aria-label", "Map of step and round");
  for (const [name, picture] of Object.entries(story.pictures)) {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.textContent = name;
    figure.append(shown(picture, story, name === "sequential" ? null : wanted, name), caption);
    find(".ends").append(figure);
  }
  slider.addEventListener("input", show);
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; find(".play").textContent = "Play"; };
  slider.addEventListener("pointerdown", stop);
  find(".play").addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = 0;
    find(".play").textContent = "Pause";
    show();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stop();
    }, 350);
  });
  document.getElementById("stories").append(section);
  show();
  redrawn.push(show);
}

stories.forEach(build);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redrawn.forEach((show) => show()));

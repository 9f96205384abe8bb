"use strict";
// The page of `report --demo`. The address's fragment holds the choice: #run=cd4&steps=4&class=0&noise=1.
const content = JSON.parse(document.getElementById("content").textContent);
const [run, steps, label, noise] = ["run", "steps", "class", "noise"].map((id) => document.getElementById(id));
const names = { run: (i) => content.runs[i].name, class: String, noise: String };
// The number of steps that the reader chose last; a run without it shows the nearest that it has.
let wantedSteps = 1;

const sheets = () => content.runs[run.selectedIndex].sheets;

function picture(sheet, column, alt) {
  // A sheet has a row for each class and noise, and a column for each step; the frame shows one cell.
  const frame = document.createElement("span"), image = document.createElement("img");
  const rows = content.classes * content.noises;
  const row = label.selectedIndex * content.noises + noise.selectedIndex;
  frame.className = "frame";
  Object.assign(image, { src: sheet.png, alt });
  Object.assign(image.style, {
    width: `${100 * sheet.steps}%`,
    height: `${100 * rows}%`,
    left: `${-100 * column}%`,
    top: `${-100 * row}%`,
  });
  frame.append(image);
  return frame;
}

function fitSlider() {
  const distances = sheets().map((sheet) => Math.abs(Math.log2(sheet.steps / wantedSteps)));
  steps.max = sheets().length - 1;
  steps.disabled = sheets().length === 1;
  steps.value = distances.indexOf(Math.min(...distances));
}

function show() {
  const sheet = sheets()[steps.value], last = sheet.steps - 1;
  const counted = `${sheet.steps} ${last ? "steps" : "step"}`;
  const chosen = [label, noise].map((select) => select.selectedOptions[0].text).join(", ");
  steps.setAttribute("aria-valuetext", counted);
  document.getElementById("counted").textContent =
    `${counted}; this run has ${sheets().map((other) => other.steps).join(", ")}`;
  document.getElementById("about").textContent =
    `${run.selectedOptions[0].text}, ${sheet.about}; ${chosen}`;
  document.getElementById("picture").replaceChildren(
    picture(sheet, last, `Sample of ${content.runs[run.selectedIndex].name} in ${counted}, ${chosen}`));
  document.getElementById("trajectory").replaceChildren(...Array.from({ length: sheet.steps }, (_, i) => {
    const item = document.createElement("li");
    item.append(picture(sheet, i, `Prediction in step ${i + 1} of ${sheet.steps}`), `${i + 1}`);
    return item;
  }));
}

function readFragment() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const select of [run, label, noise]) {
    const indices = Array.from(select.options, (_, i) => names[select.id](i));
    select.selectedIndex = Math.max(0, indices.indexOf(wanted.get(select.id)));
  }
  wantedSteps = Number(wanted.get("steps")) || sheets().at(-1).steps;
  fitSlider();
  show();
}

function writeFragment() {
  const chosen = { steps: sheets()[steps.value].steps };
  for (const select of [run, label, noise]) chosen[select.id] = names[select.id](select.selectedIndex);
  history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
}

run.addEventListener("input", fitSlider);
steps.addEventListener("input", () => { wantedSteps = sheets()[steps.value].steps; });
for (const control of [run, steps, label, noise]) {
  control.addEventListener("input", () => { show(); writeFragment(); });
}
window.addEventListener("hashchange", readFragment);
readFragment();

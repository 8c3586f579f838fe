// Comfort on top of pages that work without it: forms that apply themselves, the picture dialog, sliders.
"use strict";

const pick = (selector, root = document) => root.querySelector(selector);
const every = (selector, root = document) => [...root.querySelectorAll(selector)];

// A form of filters applies itself when a choice changes; empty fields stay out of the address.
let leaving = false; // Enter in a field both changes and submits
function apply(form) {
  if (leaving) return;
  leaving = true;
  const query = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value !== "") query.append(name, value);
  location.assign(`${form.getAttribute("action")}?${query}`);
}
addEventListener("pageshow", () => { leaving = false; });
for (const form of every("form[data-auto]")) {
  form.addEventListener("submit", (event) => { event.preventDefault(); apply(form); });
  form.addEventListener("change", (event) => {
    const name = event.target.name;
    if (event.target.dataset.size !== undefined) return;
    // Another run or table has other columns: the choices about the old ones go.
    if (name === "run" || name === "table") {
      for (const field of every("[name]", form)) if (!["run", "table", "kind"].includes(field.name)) field.disabled = true;
      if (name === "run") for (const field of every("[name=table]", form)) field.disabled = true;
    }
    if (name === "training" || name === "site") for (const field of every("[name=channel]", form)) field.disabled = true;
    apply(form);
  });
}

// Size of the pictures of a grid, kept in the address.
const size = pick("[data-size]");
if (size) {
  const show = () => document.documentElement.style.setProperty("--size", `${size.value}px`);
  show();
  size.addEventListener("input", () => {
    show();
    const here = new URL(location);
    here.searchParams.set("size", size.value);
    history.replaceState(null, "", here);
  });
}

// A picture of the grid in full, the unsteered one beside it.
const dialog = pick("#zoom");
const image = (source, alt) => Object.assign(document.createElement("img"), { src: source, alt });
for (const cell of every("[data-zoom]")) {
  cell.addEventListener("click", () => {
    const images = [image(cell.dataset.zoom, "this cell")];
    if (cell.dataset.base) images.unshift(image(cell.dataset.base, "beside all"));
    pick(".pair", dialog).replaceChildren(...images);
    pick("p", dialog).textContent = cell.dataset.words;
    dialog.showModal();
  });
}
pick("button", dialog).addEventListener("click", () => dialog.close());

// Dreams on their way, and maps of where a feature is active.
for (const dream of every("[data-frames]")) {
  const frames = every("figure", dream);
  pick("input", dream).addEventListener("input", (event) => {
    frames.forEach((frame, i) => { frame.hidden = i !== Number(event.target.value); });
  });
}
const heat = pick("[data-heat]");
if (heat) heat.addEventListener("change", () => document.body.classList.toggle("no-heat", !heat.checked));

// The live page.
const live = pick("#live");
if (live) {
  const status = pick("#status");
  const say = (text) => { status.textContent = text; };
  const strengths = () => Object.fromEntries(every("[data-strength]").map((s) => [s.dataset.strength, Number(s.value)]));
  const wanted = () => ({ prompts: live.prompts.value, seed: Number(live.seed.value), strengths: strengths() });

  async function ask(action, body) {
    const answer = await fetch(`/live/${action}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    return answer;
  }
  async function asked(action, body) {
    const answer = await ask(action, body);
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.problem);
    return found;
  }
  function remember() {
    const here = new URL(location);
    here.search = "";
    here.searchParams.set("prompts", live.prompts.value);
    here.searchParams.set("seed", live.seed.value);
    for (const [name, value] of Object.entries(strengths())) here.searchParams.set(`s.${name}`, value);
    history.replaceState(null, "", here);
  }

  let busy = false, again = false;
  async function paint() {
    if (busy) { again = true; return; }
    busy = true;
    remember();
    say("Painting ...");
    try {
      const found = await asked("show", wanted());
      for (const place of ["steered", "plain"]) {
        pick(`#${place}`).replaceChildren(...found[place].map((source, i) => image(source, `${place} image ${i + 1}`)));
      }
      pick("#painted").hidden = false;
      status.dataset.attached = found.attached;
      const times = found.attached === 1 ? "once" : `${found.attached} times`;
      say(`Painted in ${found.seconds} s; the plan was attached ${found.attached ? times : "never, nothing is fitted yet"}.`);
    } catch (error) { say(error.message); }
    busy = false;
    if (again) { again = false; paint(); }
  }
  function watch(field) { // a number, and the slider before it
    const slider = field.previousElementSibling;
    slider.addEventListener("input", () => { field.value = slider.value; });
    slider.addEventListener("change", paint);
    field.addEventListener("change", () => { slider.value = field.value; paint(); });
  }
  every("[data-strength]").forEach(watch);
  live.addEventListener("submit", (event) => { event.preventDefault(); paint(); });
  for (const name of ["fit", "open"]) {
    const form = pick(`#${name}`);
    if (!form) continue;
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const button = pick("button", form);
      button.disabled = true;
      say(name === "fit" ? "Fitting ..." : "Opening ...");
      try {
        await asked(name, Object.fromEntries(new FormData(form)));
        remember();
        location.reload();
      } catch (error) { say(error.message); button.disabled = false; }
    });
  }
  for (const button of every("[data-remove]")) {
    button.addEventListener("click", async () => { await asked("remove", { part: button.dataset.remove }); location.reload(); });
  }
  pick("#code").addEventListener("click", async () => {
    try {
      const program = pick("#program");
      program.textContent = (await asked("code", wanted())).code;
      program.hidden = false;
    } catch (error) { say(error.message); }
  });
  pick("#archive").addEventListener("click", async () => {
    const answer = await ask("archive", wanted());
    if (!answer.ok) { say((await answer.json()).problem); return; }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = "pysteer-plan.zip";
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

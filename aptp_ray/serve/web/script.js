"use strict";

const $ = (id) => document.getElementById(id);
const RECENT = 12;
const KEY = "aptp-key"; // of this tab's storage

let models = [];
let running = null; // AbortController of what is being drawn

function headers() {
  const found = { "content-type": "application/json" };
  const key = $("key").value.trim();
  if (key) found.authorization = `Bearer ${key}`;
  return found;
}

async function problem(answer) {
  const body = await answer.json().catch(() => null);
  if (answer.status === 401) askForKey();
  return body?.error?.message ?? `the service answered with status ${answer.status}`;
}

function askForKey() {
  $("key-field").hidden = false;
  $("key").focus();
}

/* -- what the service offers ------------------------------------------------------------------------------------------- */

async function loadModels() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (!answer.ok) throw new Error(await problem(answer));
  models = (await answer.json()).data;
  const whole = models[0].aptp;
  fill($("model"), models.map((model) => model.id));
  fill($("size"), whole.sizes);
  $("steps").value ||= whole.num_inference_steps;
  $("guidance").value ||= whole.guidance_scale;
  $("compare-field").hidden = !hasTeacher();
  $("about").textContent =
    `${models[0].owned_by}: ${whole.experts} experts at ${percent(whole.macs_ratio)} of the teacher's work on average. ` +
    "Every prompt is drawn by the one that it needs.";
}

function fill(select, names) {
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(chosen)) select.value = chosen;
}

const hasTeacher = () => models.some((model) => model.id === "teacher");
const percent = (ratio) => `${Math.round(100 * ratio)} %`;

/* -- drawing ------------------------------------------------------------------------------------------------------------ */

function request() {
  const seed = $("seed").value.trim();
  return {
    prompt: $("prompt").value,
    negative_prompt: $("negative").value,
    // Drawn here rather than by the service, so that the teacher gets the same noise.
    seed: seed === "" ? Math.floor(Math.random() * 2 ** 48) : Number(seed),
    num_inference_steps: Number($("steps").value),
    guidance_scale: Number($("guidance").value),
    size: $("size").value || "auto",
    model: $("model").value || "auto",
  };
}

/* Calls `see` with every event of a streamed generation. */
async function stream(body, signal, see) {
  const answer = await fetch("v1/images/generations", {
    method: "POST", headers: headers(), signal, body: JSON.stringify({ ...body, stream: true, partial_images: 3 }),
  });
  if (!answer.ok) throw new Error(await problem(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let finished = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const line = event.split("\n").find((entry) => entry.startsWith("data: "));
      if (!line) continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      finished ||= data.type === "image_generation.completed";
      see(data);
    }
  }
  if (!finished) throw new Error("the service ended the stream before the picture was there; try again");
}

async function draw(event) {
  event.preventDefault();
  running?.abort();
  const mine = (running = new AbortController());
  const body = request();
  const withTeacher = hasTeacher() && $("compare").checked && body.model !== "teacher";
  $("error").textContent = "";
  $("status").textContent = "Waiting for a place…";
  $("draw").disabled = true;
  $("stop").disabled = false;
  $("teacher-figure").hidden = !withTeacher;
  $("pictures").setAttribute("aria-busy", "true");
  try {
    const work = [stream(body, mine.signal, (data) => show("expert", data, body))];
    if (withTeacher) work.push(stream({ ...body, model: "teacher" }, mine.signal, (data) => show("teacher", data, body)));
    await Promise.all(work);
    $("status").textContent = "Done.";
  } catch (error) {
    mine.abort(); // the other picture, too
    if (error.name === "AbortError") $("status").textContent = "Stopped.";
    else {
      $("status").textContent = "";
      $("error").textContent = error.message;
    }
  } finally {
    if (running === mine) {
      running = null;
      $("draw").disabled = false;
      $("stop").disabled = true;
      $("pictures").removeAttribute("aria-busy");
    }
  }
}

function show(place, data, body) {
  const facts = data.aptp;
  const finished = data.type === "image_generation.completed";
  const image = $(`${place}-image`);
  image.src = `data:image/${data.output_format};base64,${data.b64_json}`;
  image.hidden = false;
  image.classList.toggle("draft", !finished);
  image.alt = `${finished ? "Picture" : "Preview"} by ${facts.model}: ${body.prompt}`;
  const work = `${facts.model}, ${percent(facts.macs_ratio)} of the teacher's work`;
  $(`${place}-caption`).textContent = finished ? `${work}, seed ${body.seed}` : `${work}: preview ${data.partial_image_index + 1}`;
  if (place !== "expert") return;
  why(facts);
  if (!finished) $("status").textContent = `Preview ${data.partial_image_index + 1}…`;
  else {
    times(facts);
    remember(image.src, body, facts);
  }
}

/* -- why ---------------------------------------------------------------------------------------------------------------- */

function why(facts) {
  $("why").hidden = false;
  $("times").textContent = "";
  if (facts.similarity === null) {
    $("why-text").textContent = `You named ${facts.model}, so nothing was routed.`;
    $("bars").closest("table").hidden = true;
    return;
  }
  const nearest = facts.similarity.indexOf(Math.max(...facts.similarity));
  $("why-text").textContent = facts.spilled
    ? `${facts.spilled_from} fits this prompt best but is busy, so ${facts.model} draws it.`
    : facts.expert === nearest
      ? `The code of ${facts.model} is nearest to what the prompt asks for.`
      : `expert-${nearest} is nearer by a little, but is popular: ${facts.model} comes first when all experts are to get their share.`;
  const largest = Math.max(1e-9, ...facts.similarity.map(Math.abs));
  $("bars").closest("table").hidden = false;
  $("bars").replaceChildren(...facts.similarity.map((value, index) => row(value, index, facts, largest)));
}

function row(value, index, facts, largest) {
  const entry = models.find((model) => model.id === `expert-${index}`);
  const tr = document.createElement("tr");
  const name = Object.assign(document.createElement("th"), { scope: "row", textContent: index });
  if (index === facts.expert) {
    tr.className = "chosen";
    name.textContent += " ✓";
    name.setAttribute("aria-label", `${index}, chosen`);
  }
  const similarity = Object.assign(document.createElement("td"), { className: "wide" });
  const track = Object.assign(document.createElement("span"), { className: "track" });
  track.setAttribute("aria-hidden", "true");
  const bar = Object.assign(document.createElement("span"), { className: "bar" });
  const half = (50 * Math.abs(value)) / largest; // the middle is zero
  bar.style.width = `${half}%`;
  bar.style.left = `${value < 0 ? 50 - half : 50}%`;
  track.append(bar);
  const number = Object.assign(document.createElement("span"), { className: "value", textContent: value.toFixed(3) });
  similarity.append(track, number);
  const macs = Object.assign(document.createElement("td"), { textContent: entry ? percent(entry.aptp.macs_ratio) : "" });
  tr.append(name, similarity, macs);
  return tr;
}

function times(facts) {
  if (facts.denoise_ms === null) return;
  const ms = (value) => `${Math.round(value)} ms`;
  $("times").textContent =
    `Waited ${ms(facts.queue_ms)}, denoised ${ms(facts.denoise_ms)} in batches of ${facts.batch_size.toFixed(1)}, ` +
    `decoded ${ms(facts.decode_ms)}.`;
}

/* -- recent ------------------------------------------------------------------------------------------------------------- */

function remember(source, body, facts) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = body.prompt;
  button.append(Object.assign(document.createElement("img"), { src: source, alt: `${body.prompt}, by ${facts.model}; use it again` }));
  button.addEventListener("click", () => {
    $("prompt").value = body.prompt;
    $("negative").value = body.negative_prompt;
    $("seed").value = body.seed;
    $("steps").value = body.num_inference_steps;
    $("guidance").value = body.guidance_scale;
    $("model").value = body.model;
    $("size").value = body.size;
    $("prompt").focus();
  });
  const item = document.createElement("li");
  item.append(button);
  $("recent").prepend(item);
  while ($("recent").children.length > RECENT) $("recent").lastChild.remove();
  $("recent-section").hidden = false;
}

/* -- start -------------------------------------------------------------------------------------------------------------- */

$("form").addEventListener("submit", draw);
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("key").value = sessionStorage.getItem(KEY) ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, $("key").value);
  loadModels().then(() => ($("error").textContent = ""), (error) => ($("error").textContent = error.message));
});
loadModels().catch((error) => ($("error").textContent = error.message));

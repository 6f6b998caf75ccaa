// SPDX-License-Identifier: Apache-2.0
"use strict";

const RATE = 16000; // of sounds that are sent, in Hz
const EDGE = 2048; // pictures are scaled down to this
const AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const MAX_TOKENS = 256;

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

let models = []; // what /v1/models says, each with the history of its own answers
let attached = []; // {kind, name, url, part}
let running = null; // AbortController while answers are written
let recorder = null;

// -- server

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    $("unlock").showModal();
    return;
  }
  if (!response.ok) throw new Error(await failure(response));
  models = (await response.json()).data.map((model) => ({ ...model, history: [] }));
  $("models").replaceChildren(...models.map((model) => make("li", {}, model.id, " ", schemeOf(model))));
  document.title = `${models[0].id} · masquant`;
  const accepts = models[0].accepts;
  const kinds = accepts.map((kind) => (kind === "image" ? "a picture" : "a sound"));
  $("hint").textContent = kinds.length ? `Drop ${kinds.join(" or ")} anywhere on this page, or type below.` : "Type below.";
  $("files").accept = accepts.map((kind) => `${kind}/*`).join(",");
  $("attach").hidden = !accepts.length;
  $("record").hidden = !(accepts.includes("audio") && navigator.mediaDevices && window.MediaRecorder);
}

const schemeOf = (model) => make("span", { className: "scheme", textContent: model.scheme });

// -- media

const dataUrl = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

async function picture(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, EDGE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && AS_THEY_ARE.includes(file.type)) return dataUrl(file);
  const canvas = make("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

// Any sound that the browser can play, as mono WAV
async function sound(file) {
  const decoded = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
  const context = new OfflineAudioContext(1, Math.ceil(decoded.duration * RATE), RATE);
  const source = new AudioBufferSourceNode(context, { buffer: decoded });
  source.connect(context.destination);
  source.start();
  const samples = (await context.startRendering()).getChannelData(0);
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, value) => [...value].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((x, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, x)) * 32767, true));
  return dataUrl(new Blob([view], { type: "audio/wav" }));
}

async function attach(files) {
  notice("");
  for (const file of files) {
    const kind = file.type.split("/")[0];
    const model = models.find((m) => !m.accepts.includes(kind));
    if (kind !== "image" && kind !== "audio") notice(`${file.name} is neither a picture nor a sound`);
    else if (model) notice(`${model.id} takes no ${kind === "image" ? "pictures" : "sounds"}`);
    else {
      try {
        const url = await (kind === "image" ? picture(file) : sound(file));
        const part = kind === "image"
          ? { type: "image_url", image_url: { url } }
          : { type: "input_audio", input_audio: { data: url.split(",")[1], format: "wav" } };
        attached.push({ kind, name: file.name, url, part });
      } catch {
        notice(`${file.name} cannot be read`);
      }
    }
  }
  showAttached();
}

function showAttached() {
  $("attachments").replaceChildren(
    ...attached.map((item) => {
      const remove = make("button", { type: "button", textContent: "×", title: `Remove ${item.name}`, ariaLabel: `Remove ${item.name}` });
      remove.onclick = () => {
        attached = attached.filter((other) => other !== item);
        showAttached();
      };
      const preview = item.kind === "image" ? [make("img", { src: item.url, alt: "" })] : ["♪"];
      return make("li", {}, ...preview, make("span", { textContent: item.name }), remove);
    }),
  );
  $("attachments").hidden = !attached.length;
}

async function record() {
  if (recorder) {
    recorder.stop();
    return;
  }
  notice("");
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    const pieces = [];
    recorder = new MediaRecorder(stream);
    recorder.ondataavailable = (event) => pieces.push(event.data);
    recorder.onstop = () => {
      stream.getTracks().forEach((track) => track.stop());
      const type = recorder.mimeType;
      recorder = null;
      $("record").ariaPressed = "false";
      attach([new File(pieces, "recording", { type })]);
    };
    recorder.start();
    $("record").ariaPressed = "true";
  } catch {
    notice("no microphone can be used");
  }
}

// -- conversation

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function shown(item) {
  return item.kind === "image"
    ? make("img", { src: item.url, alt: item.name })
    : make("audio", { src: item.url, controls: true, title: item.name });
}

function card(model) {
  const said = make("p", { className: "said writing" });
  said.setAttribute("aria-live", "polite");
  const footer = make("footer");
  const node = make("article", { className: "answer" }, make("h2", {}, model.id, " ", schemeOf(model)), said, footer);
  return { node, said, footer };
}

const atEnd = () => $("conversation").scrollHeight - $("conversation").scrollTop - $("conversation").clientHeight < 60;
const toEnd = () => $("conversation").scrollTo({ top: $("conversation").scrollHeight });

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) if (event !== "data: [DONE]") yield JSON.parse(event.slice("data: ".length));
  }
}

function numbers(usage, timings) {
  const of = `${usage.prompt_tokens} → ${usage.completion_tokens} tokens`;
  const speed = timings.tokens_per_second ? ` · ${timings.tokens_per_second.toFixed(1)} tokens/s` : "";
  return `${of} · first after ${timings.first_token_seconds.toFixed(2)} s${speed}`;
}

// One model's answer; true if it may go on from there
async function answer(model, message, { said, footer }, signal) {
  const messages = [...model.history, message];
  let text = "";
  try {
    const body = { model: model.id, messages, stream: true, stream_options: { include_usage: true }, temperature: 0, max_tokens: MAX_TOKENS };
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const follow = atEnd();
      const piece = event.choices[0]?.delta.content;
      if (piece) said.textContent = text += piece;
      if (event.usage) footer.textContent = numbers(event.usage, event.timings);
      if (event.choices[0]?.finish_reason === "length") said.append(make("span", { className: "cut", textContent: " …" }));
      if (follow) toEnd();
    }
    if (!text) footer.textContent = `nothing said · ${footer.textContent}`;
  } catch (error) {
    if (error.name === "AbortError") footer.textContent = "stopped";
    else said.after(make("p", { className: "error", textContent: error.message }));
  } finally {
    said.classList.remove("writing");
  }
  if (text) model.history = [...messages, { role: "assistant", content: text }];
  return Boolean(text);
}

async function send() {
  const text = $("text").value.trim();
  if (running || !models.length || (!text && !attached.length)) return;
  notice("");
  const content = [...attached.map((item) => item.part), ...(text ? [{ type: "text", text }] : [])];
  const mine = make("div", { className: "mine" });
  if (attached.length) mine.append(make("div", { className: "media" }, ...attached.map(shown)));
  if (text) mine.append(make("p", { textContent: text }));
  const cards = models.map(card);
  $("welcome").hidden = true;
  $("conversation").append(make("section", { className: "turn" }, mine, make("div", { className: "answers" }, ...cards.map((c) => c.node))));
  attached = [];
  showAttached();
  $("text").value = "";
  grow();
  toEnd();
  running = new AbortController();
  busy(true);
  await Promise.all(models.map((model, i) => answer(model, { role: "user", content }, cards[i], running.signal)));
  running = null;
  busy(false);
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("reset").disabled = yes;
}

function reset() {
  for (const model of models) model.history = [];
  document.querySelectorAll(".turn").forEach((turn) => turn.remove());
  $("welcome").hidden = false;
  $("reset").disabled = true;
  notice("");
}

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
}

// -- events

$("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("text").oninput = grow;
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
};
$("text").onpaste = (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    attach([...event.clipboardData.files]);
  }
};
$("stop").onclick = () => running?.abort();
$("reset").onclick = reset;
$("attach").onclick = () => $("files").click();
$("record").onclick = record;
$("files").onchange = () => {
  attach([...$("files").files]);
  $("files").value = "";
};
$("unlock").onclose = () => {
  sessionStorage.setItem("key", $("key").value);
  start();
};
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  attach([...event.dataTransfer.files]);
});

const start = () => loadModels().catch((error) => notice(error.message));
start();

"use strict";
const POLL_MS = 1000, LINES = 60;
const DEVICE = [47, 125, 225], HOST = [224, 117, 45];
const by = (id) => document.getElementById(id);
let key = sessionStorage.getItem("rheoserve-key"), rid = "", last = null, lines = [], shown = "";

async function poll() {
  const query = new URLSearchParams({ rid, layer: by("layer").value || 0, head: by("head").value || 0 });
  try {
    const reply = await fetch("/rheoserve/data?" + query, { headers: key ? { Authorization: "Bearer " + key } : {} });
    by("login").hidden = reply.status !== 401;
    by("status").textContent = reply.ok ? "live" : reply.status === 401 ? "needs the API key" : "error " + reply.status;
    if (reply.ok) show(await reply.json());
  } catch (error) {
    by("status").textContent = "no answer";
  }
  setTimeout(poll, POLL_MS);
}

function show(data) {
  const ranks = data.ranks.length, rank = Math.min(by("rank").value || 0, ranks - 1);
  by("rank").max = ranks - 1;
  by("ranks").hidden = ranks < 2;
  const now = data.ranks[rank], view = now.look, before = last && last.rank === rank ? last : null;
  if (view.error) return void (by("status").textContent = view.error);
  last = { time: data.time, rank, ...now };
  const since = (name) => (before ? now[name] - before[name] : 0);
  const steps = since("decode_steps"), selected = since("selected_blocks");
  const percent = (part, whole) => (whole > 0 ? (100 * part / whole).toFixed(1) + "%" : "–");
  tiles({
    "decode steps a second": before ? (steps / (data.time - before.time)).toFixed(1) : "–",
    "selected blocks resident": percent(selected - since("host_blocks"), selected),
    "attended by the CPU": percent(since("host_blocks"), since("host_blocks") + since("device_blocks")),
    "frames in use": percent(now.frames_used, now.frames_used + now.frames_free),
    "host pages in use": percent(now.host_pages_used, now.host_pages_used + now.host_pages_free),
    "copied into frames": (since("exchanged_bytes") / 1e6).toFixed(1) + " MB",
    "wait, prefilled": now.transactions_waiting,
    "a step, predicted": now.predicted_step_seconds ? (1000 * now.predicted_step_seconds).toFixed(1) + " ms" : "–",
  });
  if (before && steps > 0) split(1000 * (data.time - before.time) / steps, steps, since);
  requests(view.requests);
  by("layer").max = view.layers - 1;
  by("head").max = view.heads - 1;
  if (view.map) draw(view.map);
}

function tiles(values) {
  by("tiles").replaceChildren(...Object.entries(values).map(([name, value]) => {
    const tile = document.createElement("div"), number = document.createElement("b");
    number.textContent = value;
    tile.append(number, name);
    return tile;
  }));
}

/* Milliseconds of a step. Beside a GPU the CPU attends while the GPU does, which waits for it at the end; alone it
   selects and attends in turn. */
function split(whole, steps, since) {
  const spent = (name) => 1000 * (since(name) || 0) / steps;
  const [wait, selection, host] = ["exposed_wait", "selection", "host_attention"].map((name) => spent(name + "_seconds"));
  const attention = selection > 0 ? host : 0;
  const parts = [
    ["rest of the step", whole - wait - selection - attention, "#5a6b7b"],
    ["selection", selection, "#7a5ea8"],
    ["attention", attention, "#b3422f"],
    ["waiting for the CPU", wait, "#b3422f"],
  ];
  by("step").replaceChildren(...parts.filter(([, took]) => took > 0).map(([name, took, colour]) => {
    const part = document.createElement("span");
    part.style.cssText = `flex: ${took}; background: ${colour}`;
    part.textContent = `${name} ${took.toFixed(1)} ms`;
    return part;
  }));
  by("step").title = `${whole.toFixed(1)} ms between steps; the CPU attends for ${host.toFixed(1)} ms`;
}

function requests(all) {
  if (!all.some((one) => one.rid === rid)) choose((all.find((one) => one.state === "decoding") || { rid: "" }).rid);
  by("requests").tBodies[0].replaceChildren(...all.map((one) => {
    const row = document.createElement("tr");
    const cells = [one.rid, one.state, one.prompt_tokens, one.output_tokens, one.working_set_pages || "–"];
    for (const text of cells) row.insertCell().textContent = text;
    row.className = one.rid === rid ? "chosen" : "";
    row.onclick = () => choose(one.rid);
    return row;
  }));
}

function choose(name) {
  rid = name || rid;
}

function draw(map) {
  const what = [map.rid, map.layer, map.head, map.blocks_a_column].join();
  if (what !== shown) lines = [];
  shown = what;
  lines = [...lines, map].slice(-LINES);
  by("chosen").textContent = map.rid;
  by("where").textContent = `${map.resident_blocks} of ${map.pages} blocks on the device`;
  const canvas = by("map"), width = map.weight.length;
  canvas.width = width;
  canvas.height = LINES;
  const context = canvas.getContext("2d"), image = context.createImageData(width, LINES);
  lines.forEach((line, at) => {
    const row = lines.length - 1 - at;
    line.weight.forEach((weight, column) => {
      if (column >= width) return;
      const here = line.resident[column] / 255, light = 0.25 + 0.75 * Math.sqrt(weight / 255);
      DEVICE.forEach((part, channel) => {
        image.data[4 * (row * width + column) + channel] = light * (here * part + (1 - here) * HOST[channel]);
      });
      image.data[4 * (row * width + column) + 3] = 255;
    });
  });
  context.putImageData(image, 0, 0);
}

by("login").onsubmit = (event) => {
  event.preventDefault();
  key = by("key").value;
  sessionStorage.setItem("rheoserve-key", key);
};
poll();

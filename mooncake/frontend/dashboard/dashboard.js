// Asks for the status every two seconds and shows it. What it draws over time it has seen itself: a reload begins anew.

import { item, lineChart } from "/dashboard/charts.js";
import { bytes, duration, milliseconds, number, percent } from "/dashboard/format.js";

const POLL_MS = 2000;
const TIMEOUT_MS = 8000;
const SPAN_MS = 5 * 60_000;
const KEY = "mooncake-key";
const TIERS = [["hbm", "HBM (own pages)"], ["dram", "DRAM (store)"], ["ssd", "SSD (store)"]];
const history = [];
const $ = (id) => document.getElementById(id);

async function poll() {
  try {
    const answer = await ask();
    show(answer);
    setProblem(answer.cluster ? "" : answer.detail);
  } catch (error) {
    history.push({ time: Date.now() });
    setState("no answer", "bad");
    setProblem(error.message);
  }
  setTimeout(poll, POLL_MS);
}

async function ask() {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const answer = await fetch("/admin/status", { headers, signal: AbortSignal.timeout(TIMEOUT_MS) });
  const denied = answer.status === 401 || answer.status === 403;
  $("door").hidden = !denied;
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error?.message ?? `HTTP status ${answer.status}`);
  return body;
}

function setProblem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function setState(text, kind) {
  $("state").textContent = text;
  $("state").className = `state ${kind}`;
}

function show(status) {
  remember(status);
  document.title = `Mooncake ${status.name}`;
  $("name").textContent = `Mooncake ${status.name}`;
  $("about").textContent = `${status.model}, ${status.frontend}, up ${duration(status.uptime_s)}, version ${status.version}`;
  setState(status.ready ? "ready" : status.detail, status.ready ? "good" : "bad");
  showNumbers(status);
  showTimes(status.requests);
  showLoad();
  if (status.cluster) showCluster(status.cluster);
}

function remember({ requests, cluster, num_running }) {
  const running = cluster?.instances.reduce((sum, each) => sum + each.num_running, 0) ?? null;
  const waiting = cluster ? cluster.instances.reduce((sum, each) => sum + each.num_waiting, cluster.num_waiting) : null;
  const ttft = requests.ttft.p90_ms, tbt = requests.tbt.p90_ms;
  history.push({ time: Date.now(), ttft, tbt, running, waiting, output: requests.output_tokens_per_s, open: num_running });
  while (history.length && history[0].time < Date.now() - SPAN_MS) history.shift();
}

// ---------------------------------------------------------------- numbers

function showNumbers({ requests, num_running, cluster }) {
  const failures = Object.values(requests.failures).reduce((sum, count) => sum + count, 0);
  const rows = [
    ["Requests", number(requests.requests_per_s), "per s"],
    ["Output tokens", number(requests.output_tokens_per_s), "per s"],
    ["Under way", number(num_running), "requests"],
    ["Unplaced", cluster ? number(cluster.num_waiting) : "–", "requests"],
    ["TTFT met", percent(requests.ttft.met), `of ${number(requests.ttft.num)}`],
    ["TBT met", percent(requests.tbt.met), `of ${number(requests.tbt.num)}`],
    ["Prompt reused", percent(requests.reuse), "of tokens"],
    ["Not served", number(failures), `of ${number(requests.num_ended)}`],
  ];
  list($("numbers"), rows);
}

function showTimes({ ttft, tbt, window_s }) {
  for (const [id, objective] of [["ttft", ttft], ["tbt", tbt]]) {
    const { p50_ms, p90_ms, p99_ms } = objective;
    const shown = [["p50", p50_ms], ["p90", p90_ms], ["p99", p99_ms]].map(([name, ms]) => `${name} ${milliseconds(ms)}`);
    $(`${id}-note`).textContent = p50_ms === null
      ? `no request ended in the last ${duration(window_s)}`
      : `${shown.join(", ")} of the last ${duration(window_s)}`;
    draw(id, [["p90", id]], milliseconds, objective.default_ms, "objective");
  }
}

function showLoad() {
  draw("queue", [["running", "running"], ["waiting", "waiting"]], number);
  draw("output", [["output tokens per second", "output"]], number);
}

function draw(id, lines, format, limit = null, limitName = "") {
  const series = lines.map(([name, key]) => ({ name, values: history.map((each) => [each.time, each[key] ?? null]) }));
  lineChart($(id), { series, limit, limitName, format, now: Date.now(), span_ms: SPAN_MS });
}

// ---------------------------------------------------------------- cluster

function showCluster({ reused, instances, nodes, counts }) {
  showReuse(reused);
  table($("instances"), INSTANCE_COLUMNS, instances, "no instance has registered");
  table($("nodes"), NODE_COLUMNS, nodes, "no store node has registered");
  list($("answers"), Object.entries(counts).map(([name, count]) => [name.replaceAll("_", " "), number(count), ""]));
}

const INSTANCE_COLUMNS = [
  ["Name", (each) => each.name, "title"],
  ["Role", (each) => each.role],
  ["State", (each) => stateMark(each.state)],
  ["Waiting", (each) => number(each.num_waiting), "number"],
  ["Running", (each) => `${each.num_running} of ${each.max_batch}`, "number"],
  ["Tokens/s", (each) => number(each.tokens_per_s), "number"],
  ["Prefill queue", (each) => milliseconds(each.queue_ns / 1e6), "number"],
  ["Step", (each) => milliseconds(each.step_ns / 1e6), "number"],
  ["KV pages", (each) => meter(each.used_pages, each.num_pages, number), "broad"],
];

const NODE_COLUMNS = [
  ["Name", (each) => each.name, "title"],
  ["State", (each) => stateMark(each.connected ? "ready" : "lost")],
  ["Blocks", (each) => number(each.num_blocks), "number"],
  ["NIC out", (each) => milliseconds(each.out_ns / 1e6), "number"],
  ["NIC in", (each) => milliseconds(each.in_ns / 1e6), "number"],
  ["SSD read", (each) => milliseconds(each.ssd_ns / 1e6), "number"],
  ["DRAM", (each) => tier(each, "dram"), "broad"],
  ["SSD", (each) => tier(each, "ssd"), "broad"],
];

function showReuse(reused) {
  const total = reused.prompt;
  $("reuse-note").textContent = total
    ? `${number(total)} prompt tokens since the instances started`
    : "no prompt was prefilled since the instances started";
  const found = TIERS.map(([key, name]) => [name, reused[key]]);
  const computed = Math.max(0, total - found.reduce((sum, [, count]) => sum + count, 0));
  const parts = [...found, ["computed", computed]];
  const stack = make("div", "");
  stack.className = "stack";
  const legend = make("ul", "");
  legend.className = "legend";
  parts.forEach(([name, count], index) => {
    const share = total ? count / total : 0;
    legend.append(item(`${name} ${percent(share)}`, `c${index}`));
    if (!count) return;
    const piece = make("span", "");
    piece.className = `c${index}`;
    piece.style.flexGrow = share;
    piece.title = `${name}: ${number(count)} tokens`;
    stack.append(piece);
  });
  $("reuse").replaceChildren(...(total ? [stack] : []), legend);
}

// ---------------------------------------------------------------- pieces

// rows: of name, value and unit.
function list(place, rows) {
  place.replaceChildren(...rows.map(([name, value, unit]) => {
    const group = document.createElement("div");
    const shown = make("dd", value);
    shown.append(make("small", ` ${unit}`));
    group.append(make("dt", name), shown);
    return group;
  }));
}

function table(place, columns, rows, empty) {
  if (!rows.length) {
    const body = document.createElement("tbody");
    const cell = make("td", empty);
    cell.className = "empty title";
    body.append(rowOf([cell]));
    place.replaceChildren(body);
    return;
  }
  const head = document.createElement("thead");
  head.append(rowOf(columns.map(([name, , kind]) => classed(make("th", name), kind))));
  const body = document.createElement("tbody");
  body.append(...rows.map((row) => rowOf(columns.map(([name, value, kind]) => {
    const cell = classed(document.createElement("td"), kind);
    cell.dataset.label = name;
    cell.append(value(row));
    return cell;
  }))));
  place.replaceChildren(head, body);
}

function rowOf(cells) {
  const row = document.createElement("tr");
  row.append(...cells);
  return row;
}

function classed(cell, kind) {
  if (kind) cell.className = kind;
  return cell;
}

function tier(node, name) {
  const found = node.tiers.find((each) => each.tier === name);
  return found ? meter(found.used_bytes, found.capacity_bytes, bytes) : "–";
}

function meter(used, capacity, format) {
  const shown = document.createElement("span");
  const bar = make("span", "");
  bar.className = "meter";
  const fill = make("i", "");
  fill.style.width = `${capacity ? (100 * used) / capacity : 0}%`;
  bar.append(fill);
  shown.append(bar, `${format(used)} of ${format(capacity)}`);
  return shown;
}

function stateMark(state) {
  const mark = make("span", state);
  mark.className = `state ${state === "ready" ? "good" : state === "lost" ? "bad" : ""}`;
  return mark;
}

function make(name, content) {
  const made = document.createElement(name);
  made.textContent = content;
  return made;
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  $("door").hidden = true;
});
poll();

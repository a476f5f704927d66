"use strict";
// The page has two views: the list of latents, and one latent (#<sae>/<latent>/<layer>).
// Tokens and explanations come from text of strangers: they are only ever set as text.
const index = JSON.parse(document.getElementById("index").textContent);
const main = document.getElementById("main");
const saes = index.saes, read = new Map(), waiting = new Map();
const state = { sae: "", text: "", token: "", from: "", to: "", rate: "", score: "", sort: "rate", down: true, page: 0 };
const ROWS = 100;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null) element.append(child);
  return element;
}
const format = (value) => value === 0 ? "0" : Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3
  ? value.toExponential(1) : String(Number(value.toPrecision(3)));
const percent = (value) => value === 0 ? "0 %" : value < 1e-4 ? (100 * value).toExponential(0) + " %"
  : Number((100 * value).toPrecision(2)) + " %";
// spaces, line ends and tabs must be seen, or a token looks like nothing
const visible = (text, lines = true) => text.replace(/\n/g, lines ? "⏎\n" : "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍");
const named = (token) => (index.strings[token] ?? "?").replace(/ /g, "␣").replace(/\n/g, "⏎")
  .replace(/\t/g, "⇥").replace(/\r/g, "␍");
const badge = (text) => text ? make("span", { class: `badge ${text.split(" ")[0]}` }, text) : null; // means, narrows, same
const chip = (token) => make("span", { class: "chip" }, named(token));
const link = (sae, latent) => `#${encodeURIComponent(sae.name)}/${latent}`;

// ---- the list ----------------------------------------------------------------------------

const rows = [];
for (const sae of index.only ? [] : saes) { // the page of one latent has no list
  for (let latent = 0; latent < sae.d_sae; latent++) {
    let rate = 0, most = 0, max = 0;
    sae.layers.forEach((layer, i) => {
      rate += sae.rate[i][latent] / sae.layers.length;
      if (sae.rate[i][latent] > sae.rate[most][latent]) most = i;
      max = Math.max(max, sae.max[i][latent]);
    });
    rows.push({ sae, latent, rate, max, layer: sae.layers[most], score: sae.score[latent] });
  }
}
const scored = rows.some((row) => row.score !== null);
if (scored) state.sort = "score"; // or the explained ones would be lost among the others
const labelled = !index.only && saes.some((sae) => sae.label.some((label) => label !== null));

function matching() {
  const text = state.text.toLowerCase(), number = (v) => v === "" ? null : Number(v);
  const from = number(state.from), to = number(state.to);
  const rate = number(state.rate), score = number(state.score);
  const found = rows.filter((row) => {
    const { sae, latent } = row;
    if (state.sae && sae.name !== state.sae) return false;
    if (text && !(`${sae.name} ${latent} ${sae.label[latent] ?? ""} ${(sae.judged[latent] ?? []).map((j) => j[1])} ${sae.badge[latent]}`.toLowerCase().includes(text))) return false;
    if (state.token && !sae.peaks[latent].some((t) => t >= 0 && (index.strings[t] ?? "").trim() === state.token.trim())) return false;
    if (rate !== null && row.rate < rate / 100) return false;
    if (score !== null && !(row.score >= score)) return false;
    if (from !== null || to !== null) {
      const inside = sae.layers.some((layer, i) => (from === null || layer >= from) && (to === null || layer <= to) && sae.rate[i][latent] > 0);
      if (!inside) return false;
    }
    return true;
  });
  const key = { latent: (r) => r.latent, rate: (r) => r.rate, max: (r) => r.max, layer: (r) => r.layer,
    score: (r) => r.score ?? -1 }[state.sort];
  return found.sort((a, b) => (state.down ? key(b) - key(a) : key(a) - key(b)) || a.latent - b.latent);
}

// the search is in the address: it can be bookmarked, and "back" finds it again
const DEFAULTS = { ...state };
const changed = () => Object.entries(state).filter(([name, value]) => name !== "page" && value !== DEFAULTS[name]);
const listed = () => "#" + (changed().length ? `?${new URLSearchParams(changed())}` : "");
function restore(query) {
  const given = new URLSearchParams(query);
  Object.assign(state, DEFAULTS, Object.fromEntries([...given].filter(([name]) => name in DEFAULTS)));
  state.down = String(state.down) === "true";
  state.page = 0;
}

function list() {
  document.title = `${index.title}: latents`;
  const field = (name, title, attributes, wide) => make("label", { class: wide ? "find" : null }, title,
    make("input", { id: `find-${name}`, value: state[name], ...attributes,
      oninput: (event) => { state[name] = event.target.value; state.page = 0; fill(); } }));
  const choice = make("label", {}, "SAE", make("select", { id: "find-sae",
    onchange: (event) => { state.sae = event.target.value; state.page = 0; fill(); } },
    make("option", { value: "" }, `all ${saes.length}`),
    saes.map((sae) => make("option", { value: sae.name, selected: sae.name === state.sae }, sae.name))));
  const body = make("tbody"), count = make("p", { class: "note", "aria-live": "polite" });
  const pages = make("div", { class: "bar" });
  const heading = (name, title, hidden) => make("th", { class: "number" + (hidden ? " hide" : "") },
    make("button", { type: "button", "data-sort": name, onclick: () => {
      state.down = state.sort === name ? !state.down : true; state.sort = name; fill(); } }, title));
  const table = make("table", { class: "latents" }, make("thead", {}, make("tr", {},
    make("th", {}, "SAE"), heading("latent", "latent"), heading("rate", "fires on"), heading("layer", "mostly at layer", true),
    heading("max", "highest", true), scored ? heading("score", "F1") : null,
    labelled ? make("th", { class: "wide" }, "explanation") : null, make("th", { class: "wide" }, "peaks on"))), body);
  function fill() {
    if (location.hash.replace(/^#$/, "") !== listed().replace(/^#$/, "")) history.replaceState(null, "", listed());
    const found = matching(), last = Math.max(0, Math.ceil(found.length / ROWS) - 1);
    state.page = Math.min(state.page, last);
    const shown = found.slice(state.page * ROWS, (state.page + 1) * ROWS);
    body.replaceChildren(...shown.map((row) => make("tr", {},
      make("td", { class: "name" }, make("a", { href: link(row.sae, row.latent) }, row.sae.name)),
      make("td", { class: "number" }, make("a", { href: link(row.sae, row.latent) }, String(row.latent))),
      make("td", { class: "number" }, percent(row.rate)),
      make("td", { class: "number hide" }, row.rate ? String(row.layer) : ""),
      make("td", { class: "number hide" }, format(row.max)),
      scored ? make("td", { class: "number" }, row.score === null ? "" : row.score.toFixed(2)) : null,
      labelled ? make("td", { class: "wide" }, row.sae.label[row.latent] ?? "", " ",
        badge(row.sae.badge[row.latent])) : null,
      make("td", { class: "wide" }, row.sae.peaks[row.latent].filter((t) => t >= 0).map(chip)))));
    const explained = rows.filter((row) => row.score !== null).length;
    count.textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} latents` +
      (scored ? `, ${explained.toLocaleString("en")} of them drawn to be explained` : "");
    pages.replaceChildren(...(last ? [
      make("button", { type: "button", disabled: state.page === 0, onclick: () => { state.page--; fill(); } }, "← earlier"),
      make("span", {}, `page ${state.page + 1} of ${last + 1}`),
      make("button", { type: "button", disabled: state.page === last, onclick: () => { state.page++; fill(); } }, "later →")] : []));
    for (const button of table.querySelectorAll("[data-sort]")) {
      const on = button.dataset.sort === state.sort;
      button.parentElement.setAttribute("aria-sort", on ? (state.down ? "descending" : "ascending") : "none");
      button.textContent = button.textContent.replace(/ [↓↑]$/, "") + (on ? (state.down ? " ↓" : " ↑") : "");
    }
    order = found;
  }
  main.replaceChildren(make("div", { class: "controls", role: "search" },
    field("text", labelled ? "explanation, SAE or number" : "SAE or number", { type: "search" }, true),
    field("token", "peaks on token", { type: "search" }),
    choice, field("from", "from layer", { type: "number", min: 0 }), field("to", "to layer", { type: "number", min: 0 }),
    field("rate", "fires on at least, %", { type: "number", min: 0, step: "any" }),
    scored ? field("score", "F1 at least", { type: "number", min: 0, max: 1, step: "any" }) : null),
    count, make("div", { class: "scroll" }, table), pages,
    make("p", { class: "note keys" }, make("kbd", {}, "/"), " search, ", make("kbd", {}, "j"), " and ", make("kbd", {}, "k"),
      " next and previous latent, ", make("kbd", {}, "l"), " next layer, ", make("kbd", {}, "Esc"), " back to the list"));
  fill();
}
let order = rows;

// ---- one latent --------------------------------------------------------------------------

function piece(name, data) { // called by data/*.js where the page does not contain its data
  read.set(name, data);
  for (const done of waiting.get(name) ?? []) done(data);
  waiting.delete(name);
}
function fetched(sae, latent) {
  const name = `${sae.name}.${Math.floor(latent / index.chunk)}`, place = latent % index.chunk;
  if (read.has(name)) return Promise.resolve(read.get(name)[place]);
  if (index.inline) {
    read.set(name, JSON.parse(document.getElementById(`piece-${name}`).textContent));
    return Promise.resolve(read.get(name)[place]);
  }
  return new Promise((done, failed) => {
    if (!waiting.has(name)) {
      waiting.set(name, []);
      document.head.append(make("script", { src: `data/${encodeURIComponent(name)}.js`, onerror: () => failed(name) }));
    }
    waiting.get(name).push((data) => done(data[place]));
  });
}

function unpack(sae, text, max) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), view = new DataView(bytes.buffer);
  let at = 0;
  const contexts = (layers) => {
    const count = bytes[at++], found = [];
    for (let n = 0; n < count; n++) {
      const start = view.getUint32(at, true), peak = bytes[at + 4], length = bytes[at + 5];
      at += 6;
      const acts = [];
      for (let i = 0; i < layers; i++, at += length) acts.push(bytes.subarray(at, at + length));
      const tokens = [];
      for (let i = 0; i < length; i++, at += index.wide ? 4 : 2) {
        tokens.push(index.wide ? view.getUint32(at, true) : view.getUint16(at, true));
      }
      found.push({ start, peak, acts, tokens });
    }
    return found;
  };
  const across = contexts(sae.layers.length);
  return { across, layers: sae.layers.map(() => ({ top: contexts(1), bands: contexts(1) })), max };
}

function coloured(context, acts, max, lines = true) {
  return make("div", { class: "tokens" }, context.tokens.map((token, i) => {
    const share = acts[i] / 255, value = format(share * max);
    return make("span", {
      style: acts[i] ? `background:rgba(var(--fire),${(.12 + .78 * share).toFixed(3)})` : null,
      class: i === context.peak ? "peak" : null,
      title: acts[i] ? `${named(token)}  ${value}` : named(token) }, visible(index.strings[token] ?? "?", lines));
  }));
}
function shown(context, max) {
  const where = context.start + context.peak, explain = where < index.tokens[0];
  return make("div", { class: "context" },
    make("div", { class: "value" }, format(context.acts[0][context.peak] / 255 * max),
      make("span", { class: "at", title: `token ${where}` }, explain ? "explain" : "held-out")),
    coloured(context, context.acts[0], max));
}
function histogram(counts, end) {
  let last = counts.length - 1;
  while (last > 0 && !counts[last]) last--;
  const top = Math.log1p(Math.max(...counts, 1)), width = 300 / (last + 1);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 300 92");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "histogram of the activations above zero");
  counts.slice(0, last + 1).forEach((count, i) => {
    const height = 74 * Math.log1p(count) / top, bar = document.createElementNS(svg.namespaceURI, "rect");
    Object.entries({ x: i * width, y: 76 - height, width: Math.max(width - .6, .4), height }).forEach(([k, v]) => bar.setAttribute(k, v));
    const title = document.createElementNS(svg.namespaceURI, "title");
    title.textContent = `${format(i * end / 64)} to ${format((i + 1) * end / 64)}: ${count.toLocaleString("en")}`;
    bar.append(title);
    svg.append(bar);
  });
  [["0", 0, "start"], [format((last + 1) * end / 64), 300, "end"]].forEach(([text, x, anchor]) => {
    const label = document.createElementNS(svg.namespaceURI, "text");
    Object.entries({ x, y: 89, "text-anchor": anchor }).forEach(([k, v]) => label.setAttribute(k, v));
    label.textContent = text;
    svg.append(label);
  });
  return svg;
}
function logits(title, pairs, kind) {
  return make("div", {}, make("h3", {}, title), make("table", {}, make("tbody", {}, pairs.map(([token, value]) =>
    make("tr", {}, make("td", {}, chip(token)), make("td", { class: `number ${kind}` }, format(value)))))));
}

// A small table of numbers or signs, one cell a pair of layers; `cell` gives text, strength, title.
function matrix(caption, rows, columns, cell) {
  return make("div", {}, make("h3", {}, caption), make("div", { class: "scroll" }, make("table", { class: "matrix" },
    make("thead", {}, make("tr", {}, make("th", {}), columns.map((b) => make("th", {}, String(b))))),
    make("tbody", {}, rows.map((a, i) => make("tr", {}, make("th", {}, String(a)), columns.map((b, j) => {
      const [text, strength, title] = cell(i, j, a, b);
      return make("td", { title, style: `background:rgba(var(--cool),${(.7 * Math.min(Math.max(strength, 0), 1)).toFixed(3)})` }, text);
    })))))));
}
const SIGNS = { same: "=", narrower: "⊂", broader: "⊃", different: "≠", unclear: "·" };
function explanations(sae, detail) {
  const { layers } = sae, several = layers.length > 1;
  const pairs = new Map(detail.pairs.map((pair) => [`${pair[0]} ${pair[1]}`, pair]));
  return make("section", {}, make("h2", {}, "Rules, and where they hold"),
    make("div", { class: "scroll" }, make("table", { class: "rules" }, make("thead", {}, make("tr", {},
      several ? make("th", {}, "made at") : null, make("th", {}, "rules"), make("th", { class: "number" }, "F1"), make("th", { class: "number" }, "null"))),
      make("tbody", {}, detail.made.map(([place, text, f1, none]) => make("tr", {},
        several ? make("td", {}, place === "all" ? "all layers" : `layer ${place}`) : null,
        make("td", {}, text),
        make("td", { class: "number" }, f1.toFixed(3)), make("td", { class: "number" }, none.toFixed(3))))))),
    make("p", { class: "note" }, `F1 over all held-out tokens; null: F1 of another latent's rules. A table of activations by token: AUPRC ${detail.token.toFixed(3)}.`),
    several ? make("div", { class: "columns" },
      matrix("Transfer τ: rules made at a row's layer, at a column's layer", [...layers, "all"], layers, (i, j, a, b) => {
        const tau = detail.tau[i][j];
        return tau === null ? ["", 0, "not defined: too few firings, or no rule of its own"] : [tau.toFixed(2), tau, `made at ${a === "all" ? "all layers" : `layer ${a}`}, at layer ${b}: ${tau}`];
      }),
      detail.pairs.length ? matrix("The latent at a column's layer, against a row's", layers.slice(0, -1), layers.slice(1), (i, j, a, b) => {
        const pair = pairs.get(`${a} ${b}`);
        return pair ? [SIGNS[pair[2]], pair[2] === "same" ? .15 : pair[2] === "unclear" ? 0 : .6,
          `layers ${a} and ${b}: ${pair[2]}, drift ${pair[3].toFixed(2)} bit${pair[4] === null ? "" : `, q ${pair[4]}`}`] : ["", 0, null];
      }) : null) : "",
    several ? make("p", { class: "note" }, (detail.labels === null ? "" : `It needs ${detail.labels} label${detail.labels > 1 ? "s" : ""}. `) +
      "= same, ⊂ narrower, ⊃ broader, ≠ different, · unclear") : "");
}

async function latentPage(sae, latent, layer) {
  let data;
  try {
    data = await fetched(sae, latent);
  } catch (name) {
    main.replaceChildren(make("p", {}, `data/${name}.js is missing next to this page: copy the folder interpretation/ with all its files.`));
    return;
  }
  document.title = `${sae.name} ${latent}: ${index.title}`;
  const found = unpack(sae, data.contexts, data.max), { max } = data;
  const rates = sae.layers.map((_, i) => sae.rate[i][latent]), total = rates.reduce((a, b) => a + b, 0);
  let at = sae.layers.indexOf(layer);
  if (at < 0) at = rates.indexOf(Math.max(...rates));
  const go = (i) => { // (the page of one latent may be part of another page, whose address is not its own)
    if (index.only) latentPage(sae, latent, sae.layers[i]); else location.replace(`${link(sae, latent)}/${sae.layers[i]}`);
  };
  const place = order.findIndex((row) => row.sae === sae && row.latent === latent);
  const step = (by) => { const row = order[place + by]; if (row) location.hash = link(row.sae, row.latent); };
  keys = { j: () => step(1), k: () => step(-1), l: () => go((at + 1) % sae.layers.length) };
  const several = sae.layers.length > 1, here = found.layers[at];
  const explanation = sae.label[latent] === null ? null : make("div", {},
    make("p", { class: "label" }, sae.label[latent], " ", badge(sae.badge[latent])),
    sae.score[latent] === null ? null : make("p", { class: "note" }, `F1 ${sae.score[latent].toFixed(3)} on all held-out tokens; ";" separates rules, of which one must hold`),
    (sae.judged[latent] ?? []).map(([judge, text, scores]) => [
      make("p", { class: "label" }, text), make("p", { class: "note" }, `${judge}: ${scores}`)]).flat());
  main.replaceChildren(
    index.only ? "" : make("div", { class: "bar" },
      make("a", { href: listed() }, "← all latents"), make("span", { class: "spring" }),
      make("button", { type: "button", disabled: place < 1, onclick: () => step(-1) }, "previous"),
      make("button", { type: "button", disabled: place < 0 || place + 1 >= order.length, onclick: () => step(1) }, "next")),
    make("h2", {}, `${sae.name}, latent ${latent}`), explanation ?? "",
    total ? "" : make("p", { class: "note" }, "This latent never fired on the text that was read."),
    labelled && sae.label[latent] === null ? make("p", { class: "note" }, "It is not among the latents that were drawn to be explained.") : "",
    make("div", { class: "columns" },
      make("div", {}, make("h3", {}, several ? "At each layer of its group" : "How often it fires"),
        make("div", { class: "share" }, make("span", { class: "head" }, "layer"), make("span", { class: "head" }, "share of its firings"),
          make("span", { class: "head number" }, "share"), make("span", { class: "head number" }, "fires on"),
          sae.layers.flatMap((number, i) => [
            several ? make("button", { type: "button", "aria-pressed": String(i === at), onclick: () => go(i) }, String(number)) : make("span", {}, String(number)),
            make("i", { style: `width:${total ? 100 * rates[i] / Math.max(...rates) : 0}%` }),
            make("span", { class: "number" }, total ? percent(rates[i] / total) : ""), make("span", { class: "number" }, percent(rates[i]))]))),
      make("div", {}, make("h3", {}, `Activations at layer ${sae.layers[at]}`), histogram(data.hist[at], data.end[at]),
        make("p", { class: "note" }, "Number of firings by activation; heights are logarithmic")),
      make("div", {}, make("h3", {}, "Nearest latents, by cosine of the decoder"), make("table", {}, make("tbody", {}, data.near.map(([other, cosine]) =>
        make("tr", {}, make("td", {}, index.only ? String(other) : make("a", { href: link(sae, other) }, String(other)), " ", sae.label[other] ?? "",
          " ", sae.peaks[other].filter((t) => t >= 0).map(chip)), make("td", { class: "number" }, cosine.toFixed(2)))))))),
    data.up.length ? make("div", { class: "columns" }, logits("Raises the logits of", data.up, "up"), logits("Lowers the logits of", data.down, "down")) : "",
    several && found.across.length ? make("section", {}, make("h2", {}, "The same context at every layer"),
      found.across.map((context) => make("div", { class: "context" },
        make("div", { class: "value" }, format(Math.max(...context.acts.map((a) => a[context.peak])) / 255 * max)),
        make("div", { class: "rows" }, sae.layers.flatMap((number, i) => [make("b", {}, String(number)), coloured(context, context.acts[i], max, false)]))))) : "",
    data.explained ? explanations(sae, data.explained) : "",
    make("section", {}, make("h2", {}, `Highest activations at layer ${sae.layers[at]}`),
      here.top.length ? here.top.map((context) => shown(context, max)) : make("p", { class: "note" }, "It never fired here.")),
    here.bands.length ? make("section", {}, make("h2", {}, `A sample of its firings at layer ${sae.layers[at]}, strongest first`),
      make("p", { class: "note" }, "Drawn at random from all windows of text in which it fires, from the strongest to the weakest fifth."),
      here.bands.map((context) => shown(context, max))) : "");
  // one line a layer, so that tokens stand below each other: the peak is in sight
  for (const rows of main.querySelectorAll(".rows")) rows.scrollLeft = rows.querySelector(".peak").offsetLeft - rows.clientWidth / 2;
}

// ---- navigation --------------------------------------------------------------------------

let keys = {};
function route() {
  if (index.only) return latentPage(saes[0], index.only[1], index.only[2]);
  if (!location.hash || location.hash.startsWith("#?")) { restore(location.hash.slice(2)); keys = {}; list(); return; }
  const [name, latent, layer] = location.hash.slice(1).split("/").map(decodeURIComponent);
  const sae = saes.find((each) => each.name === name);
  if (!sae || !(Number(latent) < sae.d_sae)) { keys = {}; list(); return; }
  latentPage(sae, Number(latent), layer === undefined ? -1 : Number(layer));
  window.scrollTo(0, 0);
}
window.addEventListener("hashchange", route);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const onList = !location.hash || location.hash.startsWith("#?");
  if (event.key === "Escape" && !index.only) { if (!onList) location.hash = listed(); else document.activeElement.blur(); return; }
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
  if (event.key === "/" && onList && !index.only) { event.preventDefault(); document.getElementById("find-text").focus(); return; }
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
document.getElementById("subtitle").textContent =
  `${saes.length} SAE${saes.length > 1 ? "s" : ""} on ${index.hookpoint} of ${index.model}; ` +
  `${index.tokens[0].toLocaleString("en")} tokens to explain, ${index.tokens[1].toLocaleString("en")} held-out tokens`;
route();

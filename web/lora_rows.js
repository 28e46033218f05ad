// IterIS LoRAs as a list: one line a LoRA (on, file, strength), the rest of it folded. The node's own
// widgets hold the values and are hidden.
import { app } from '../../scripts/app.js';
import { api } from '../../scripts/api.js';
import { label } from './page_text.js';
import { STRIP_LINES, STRIP_STYLE, blockStrip } from './block_strip.js';

const ROWS = 10;
const NONE = 'none';
const EMPTY = { lora: NONE, on: true, strength: 1, clip: 1, weight: 1, prompts: 'auto', words: '', blocks: '' };
const PARTS = Object.keys(EMPTY);
const FOLDED = ['clip', 'weight', 'prompts', 'words', 'blocks'];
const FILLED = 'iteris_filled'; // words that were filled in, by row, and not by the user
const OPEN = 'iteris_open'; // rows that are unfolded: a state without them would be of another size
const [LINE, WIDTH, MARGIN] = [26, 320, 6];
const STYLE = `
.iteris-loras { font: 12px sans-serif; color: var(--input-text); overflow: hidden; }
.iteris-loras > div, .iteris-loras label {
  display: flex; align-items: center; gap: 4px; height: ${LINE - 2}px; margin-bottom: 2px;
  padding: 0 4px; border-radius: 6px; box-sizing: border-box; }
.iteris-loras > .row { background: var(--comfy-input-bg); }
.iteris-loras label { padding-left: 42px; }
.iteris-loras label span { width: 90px; flex: none; overflow: hidden; white-space: nowrap; }
.iteris-loras button { all: unset; cursor: pointer; padding: 0 4px; text-align: center; }
.iteris-loras button:focus-visible { outline: 1px solid var(--input-text); }
.iteris-loras .file { flex: 1; min-width: 0; overflow: hidden; text-align: left;
  text-overflow: ellipsis; white-space: nowrap; }
.iteris-loras .off .file, .iteris-loras .off .strength { opacity: 0.4; }
.iteris-loras .missing .file { color: var(--error-text); }
.iteris-loras .edit { display: none; }
.iteris-loras .row:hover .edit, .iteris-loras .row:focus-within .edit { display: block; }
.iteris-loras input:not([type=checkbox]), .iteris-loras select {
  flex: 1; min-width: 0; height: 20px; box-sizing: border-box; color: inherit; font: inherit;
  border: none; border-radius: 4px; background: var(--comfy-menu-bg); }
.iteris-loras input.strength { flex: 0 0 56px; }
.iteris-loras .count { flex: 1; opacity: 0.7; }${STRIP_STYLE}`;

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const linked = (node, name) =>
  node.inputs?.some((input) => input.widget?.name === name && input.link != null);
const rowLinked = (node, row) => PARTS.some((part) => linked(node, `${part}_${row}`));
const choices = (widget) => {
  const { values } = widget.options;
  return typeof values === 'function' ? values(widget) : values;
};

function read(node, row) {
  const values = PARTS.map((part) => [part, widgetOf(node, `${part}_${row}`)?.value]);
  return { ...Object.fromEntries(values), filled: node.properties[FILLED]?.[row] };
}

function write(node, row, { filled, ...values }) {
  for (const [part, value] of Object.entries(values)) widgetOf(node, `${part}_${row}`).value = value;
  node.properties[FILLED] = { ...node.properties[FILLED], [row]: filled };
}

function used(node) {
  const every = Array.from({ length: ROWS }, (_, index) => index + 1);
  return every.filter((row) => widgetOf(node, `lora_${row}`)?.value !== NONE || rowLinked(node, row));
}

const isOpen = (node, row) => node.properties[OPEN]?.includes(row) ?? false;

function setShown(widget, shown) {
  if (!widget) return;
  widget.hidden = !shown;
  widget.options ??= {};
  widget.options.hidden = !shown;
}

// A step for undo: the front end looks for changes before a click has its effect.
function changed(node) {
  arrange(node);
  node.graph?.setDirtyCanvas?.(true, true);
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}

// The LoRAs in another order, or fewer, from the first row on.
function rewrite(node, rows) {
  for (let row = 1; row <= ROWS; row++) write(node, row, rows[row - 1] ?? EMPTY);
  node.properties[OPEN] = [];
  changed(node);
}

async function fillIn(node, row) {
  const before = read(node, row);
  if (before.words && before.words !== before.filled) return; // the user's own
  const answer = await api.fetchApi(`/iteris/words?lora=${encodeURIComponent(before.lora)}`);
  const { words } = answer.ok ? await answer.json() : { words: '' };
  const now = read(node, row);
  if (now.lora !== before.lora || now.words !== before.words) return; // chosen again meanwhile
  write(node, row, { ...now, words, filled: words });
  changed(node);
}

// Folders as menus of their own, and then all files, which the field above them filters.
function entriesOf(names) {
  const folders = new Map();
  for (const name of names) {
    const end = Math.max(name.lastIndexOf('/'), name.lastIndexOf('\\'));
    if (end > 0) folders.set(name.slice(0, end), [...(folders.get(name.slice(0, end)) ?? []), name]);
  }
  const file = (name) => ({ content: label(name), name });
  const menus = [...folders].map(([folder, of]) => (
    { content: `${label(folder)}/`, has_submenu: true, submenu: { options: of.map(file) } }
  ));
  return [...menus, ...(menus.length ? [null] : []), ...names.map(file)];
}

// What a file says of itself, once the pointer is on its name.
async function describe(element, lora) {
  element.onmouseenter = null;
  const answer = await api.fetchApi(`/iteris/about?lora=${encodeURIComponent(lora)}`);
  if (answer.ok) element.title = [lora, ...(await answer.json()).lines].join('\n');
}

function choose(node, row, event) {
  const names = choices(widgetOf(node, `lora_${row}`)).filter((name) => name !== NONE);
  const callback = ({ name }) => {
    if (!name) return; // of a folder
    write(node, row, { ...read(node, row), lora: name });
    changed(node);
    fillIn(node, row).catch(console.warn);
  };
  const entries = entriesOf(names);
  for (const entry of entries) if (entry?.submenu) entry.submenu.callback = callback;
  const scale = Math.max(1, app.canvas.ds.scale);
  window.LGraphCanvas.active_canvas = app.canvas; // which the menu's filter takes for granted
  new window.LiteGraph.ContextMenu(entries, { event, scale, className: 'dark', callback }, window);
}

function make(tag, values = {}, ...children) {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
}

const button = (text, title, className, onclick) =>
  make('button', { type: 'button', textContent: text, title, className, onclick });

function toggle(checked, title, set) {
  return make('input', { type: 'checkbox', checked, title, onchange: (event) => set(event.target.checked) });
}

// A widget's value as a field of its own.
function field(node, name, className = '') {
  const widget = widgetOf(node, name);
  const title = widget.tooltip ?? widget.options.tooltip ?? '';
  const set = (value) => {
    widget.value = value;
    changed(node);
  };
  if (widget.options.values) {
    const options = choices(widget).map((value) => make('option', { value, textContent: value }));
    const select = make('select', { title, className, onchange: () => set(select.value) }, ...options);
    select.value = widget.value;
    return select;
  }
  const isNumber = typeof widget.value === 'number';
  const { min, max } = widget.options;
  const limits = isNumber ? { type: 'number', step: 0.05, min, max } : { type: 'text' };
  const input = make('input', { ...limits, title, className, value: widget.value });
  input.onchange = () => {
    if (!isNumber) return set(input.value);
    const value = Number(input.value);
    set(input.value === '' || Number.isNaN(value) ? widget.value : Math.min(max, Math.max(min, value)));
  };
  return input;
}

function line(node, row, rows) {
  const { lora, on } = read(node, row);
  const widget = widgetOf(node, `lora_${row}`);
  const here = linked(node, `lora_${row}`) || choices(widget).includes(lora);
  const open = isOpen(node, row);
  const fold = button(open ? '▾' : '▸', '', 'fold', () => {
    const others = rows.filter((number) => number !== row && isOpen(node, number));
    node.properties[OPEN] = open ? others : [...others, row];
    changed(node);
  });
  const switched = toggle(on, widgetOf(node, `on_${row}`).tooltip ?? '', (value) => {
    widgetOf(node, `on_${row}`).value = value;
    changed(node);
  });
  const file = button(lora.replace(/\.safetensors$/, ''), lora, 'file', (event) => choose(node, row, event));
  file.onmouseenter = () => describe(file, lora).catch(console.warn);
  const order = rows.map((number) => read(node, number));
  const at = rows.indexOf(row);
  const moved = (to) => {
    const others = order.filter((_, index) => index !== at);
    if (to !== null) others.splice(to, 0, order[at]);
    rewrite(node, others);
  };
  const edits = rows.some((number) => rowLinked(node, number)) ? [] : [
    button('↑', '', 'edit up', () => moved(Math.max(0, at - 1))),
    button('↓', '', 'edit down', () => moved(at + 1)),
    button('✕', '', 'edit remove', () => moved(null)),
  ];
  const className = `row${on ? '' : ' off'}${here ? '' : ' missing'}`;
  const parts = [fold, switched, file, ...edits, field(node, `strength_${row}`, 'strength')];
  return make('div', { className }, ...parts);
}

function details(node, row) {
  return FOLDED.map((part) => {
    const widget = widgetOf(node, `${part}_${row}`);
    const text = (widget.label ?? widget.name).replace(/^\d+\s*|_\d+$/g, '');
    return make('label', {}, make('span', { textContent: text }), field(node, widget.name));
  }).concat(strip(node, row));
}

// The weights by block as bars, and the list that they are of.
function strip(node, row) {
  const widget = widgetOf(node, `blocks_${row}`);
  const redraw = () => { if (isOpen(node, row)) arrange(node); };
  return blockStrip({
    lora: read(node, row).lora,
    text: widget.value,
    layouts: node.iterisLayouts,
    redraw,
    set: (text) => {
      widget.value = text;
      changed(node);
    },
  });
}

function header(node, rows) {
  const on = (row) => widgetOf(node, `on_${row}`);
  const all = toggle(rows.length > 0 && rows.every((row) => on(row).value), '', (value) => {
    for (const row of rows) on(row).value = value;
    changed(node);
  });
  all.className = 'all';
  const free = Array.from({ length: ROWS }, (_, index) => index + 1).find((row) => !rows.includes(row));
  const add = button('+ LoRA', '', 'add', (event) => choose(node, free, event));
  const count = make('span', { className: 'count', textContent: `${rows.filter((row) => on(row).value).length} / ${rows.length}` });
  return make('div', {}, all, count, ...(free ? [add] : []));
}

// Draws the list, and hides what it stands for: all but inputs that are linked, and lines where used.
function arrange(node) {
  const rows = used(node);
  const inLines = (row) => read(node, row).prompts === 'lines' && read(node, row).on;
  for (const widget of node.widgets) {
    if (PARTS.some((part) => widget.name.startsWith(`${part}_`))) setShown(widget, linked(node, widget.name));
  }
  setShown(widgetOf(node, 'lines'), rows.some(inLines));
  // The front end misses files of lists alone; that of a row that is off may be gone.
  for (const row of rows) widgetOf(node, `lora_${row}`).type = read(node, row).on ? 'combo' : 'text';
  const shown = rows.map((row) => [line(node, row, rows), ...(isOpen(node, row) ? details(node, row) : [])]);
  const lines = [header(node, rows), ...shown.flat()];
  node.iterisList.replaceChildren(make('style', { textContent: STYLE }), ...lines);
  const strips = lines.filter((element) => element.classList.contains('blocks')).length;
  node.iterisHeight = (lines.length + strips * (STRIP_LINES - 1)) * LINE + 2 * MARGIN;
  const width = Math.max(node.size[0], WIDTH);
  node.setSize([width, node.computeSize([width, 0])[1]]);
  node.setDirtyCanvas?.(true, true);
}

const ownRows = (node) => node.widgets.filter(({ name }) => /^loras\.\d+\.lora_name$/.test(name)).map(({ name, value }) => (
  { lora: value, on: true, strength: widgetOf(node, name.replace('lora_name', 'strength'))?.value ?? 1 }
));

const valueOf = (node, name) => widgetOf(node, name)?.value;
// Bypassed or muted, a loader puts nothing on MODEL.
const ofLoader = (node) => [{
  lora: valueOf(node, 'lora_name'),
  on: node.mode === 0,
  strength: valueOf(node, 'strength_model'),
  strengthTwo: valueOf(node, 'strength_clip') ?? 0,
}];

// The LoRAs of a node: in one value each (rgthree), in widgets loras.NUMBER.FIELD of ComfyUI's own
// lists, of which one is for the model alone and one for the text encoder, or one of a chain.
const LISTS = {
  'Power Lora Loader (rgthree)': (node) => node.widgets.map((widget) => widget.value),
  LoadLoraModel: (node) => ownRows(node).map((row) => ({ ...row, strengthTwo: 0 })),
  LoadLoraTextEncoder: (node) => ownRows(node).map((row) => ({ ...row, strength: 0, strengthTwo: row.strength })),
  LoraLoader: ofLoader,
  LoraLoaderModelOnly: ofLoader,
};
const MERGES = ['IterisMerge', 'IterisMergeExperts', 'IterisCompareMerges'];
const BYPASSED = 4;

export const isLoraList = (node) => Object.hasOwn(LISTS, node.type);

// Every list before and behind a node, on the line of MODEL.
function chainOf(node) {
  const chain = [node];
  for (let at = node.getInputNode?.(0); at && isLoraList(at); at = at.getInputNode(0)) chain.unshift(at);
  for (let at = node.getOutputNodes?.(0)?.find(isLoraList); at; at = at.getOutputNodes(0)?.find(isLoraList)) chain.push(at);
  return chain;
}

// The same on a node of ours below it, or on a chain of them. A merge behind it takes them, and MODEL
// and CLIP as they are without them: on MODEL as well, each LoRA would count twice.
export function fromLoraList(node) {
  const chain = chainOf(node);
  const loras = chain.flatMap((one) => LISTS[one.type](one)).filter((value) => value?.lora && value.lora.toLowerCase() !== NONE);
  let before = null;
  for (let start = 0; start < loras.length; start += ROWS) {
    const made = window.LiteGraph.createNode('IterisLoras');
    made.pos = [node.pos[0] + (start / ROWS) * 2 * WIDTH, node.pos[1] + node.size[1] + 60];
    node.graph.add(made);
    before?.connect(0, made, made.inputs.findIndex((input) => input.name === 'concepts'));
    before = made;
    const rows = loras.slice(start, start + ROWS).map(({ lora, on, strength, strengthTwo }) => (
      { ...EMPTY, lora, on, strength, clip: strengthTwo ?? strength }
    ));
    rewrite(made, rows);
    for (const row of used(made)) fillIn(made, row).catch(console.warn);
  }
  for (const merge of chain.at(-1).getOutputNodes?.(0) ?? []) {
    const slot = merge.inputs.findIndex((input) => input.name === 'concepts');
    if (!before || !MERGES.includes(merge.type) || merge.inputs[slot].link != null) continue;
    before.connect(0, merge, slot);
    for (const one of chain) one.mode = BYPASSED;
  }
}

export function prepareLoras(node) {
  node.iterisLayouts = new Map(); // of LoRAs without weights by block: the list that is shown
  node.iterisList = make('div', { className: 'iteris-loras' });
  for (const kind of ['pointerdown', 'wheel', 'contextmenu']) {
    node.iterisList.addEventListener(kind, (event) => event.stopPropagation());
  }
  const height = () => node.iterisHeight;
  const list = node.addDOMWidget('loras', 'iteris-loras', node.iterisList, {
    serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: height, getMaxHeight: height,
  });
  list.serialize = false;
  node.widgets.unshift(...node.widgets.splice(node.widgets.indexOf(list), 1));
  for (const name of ['onConfigure', 'onConnectionsChange', 'onSerialize']) {
    const before = node[name];
    node[name] = function (...args) {
      const result = before?.apply(this, args);
      // The list is first and has no value, which the front end would leave a gap for.
      if (name === 'onSerialize') args[0].widgets_values = node.widgets.filter((w) => w.serialize !== false).map((w) => w.value);
      else arrange(node);
      return result;
    };
  }
  arrange(node);
}

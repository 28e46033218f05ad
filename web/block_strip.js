// Weights by block as a strip of bars: drag to draw them, double click for 1. The text of the field
// above it is what they stand in.
import { api } from '../../scripts/api.js';

export const STRIP_LINES = 3; // of the list, that a strip is high
const HIGHEST = 2;
const STEP = 0.05;
const [TWICE, NEAR] = [350, 3]; // milliseconds and pixels between the two clicks of a double one
const TITLES = { 12: 'SDXL', 17: 'SD', 20: 'SDXL+', 26: 'SD+', 61: 'FLUX.1' }; // +: convolutions too
export const STRIP_STYLE = `
.iteris-loras > .blocks { height: ${STRIP_LINES * 26 - 2}px; padding-left: 42px; align-items: stretch; }
.iteris-loras > .blocks select { flex: 0 0 90px; align-self: flex-start; }
.iteris-loras .bars { flex: 1; min-width: 0; display: flex; gap: 1px; position: relative;
  touch-action: none; cursor: crosshair; border-radius: 4px; background: var(--comfy-menu-bg); }
.iteris-loras .bars::before { content: ''; position: absolute; left: 0; right: 0; top: 50%;
  border-top: 1px dashed currentColor; opacity: 0.3; pointer-events: none; }
.iteris-loras .bars > i { flex: 1; min-width: 0; display: flex; align-items: flex-end; }
.iteris-loras .bars > i > b { flex: 1; background: var(--input-text); opacity: 0.55; }
.iteris-loras .bars > i:hover > b { opacity: 1; }
.iteris-loras .bars > .negative > b { background: var(--error-text); }
.iteris-loras .bars.untouched > i > b { opacity: 0.25; }
.iteris-loras .hovered { position: absolute; right: 4px; top: 2px; pointer-events: none;
  text-shadow: 0 0 3px var(--comfy-menu-bg), 0 0 3px var(--comfy-menu-bg); }`;

const known = new Map(); // LoRA → its usual count, and all lists and presets
let last = null; // the bar that was clicked, and when
function ask(lora, then) {
  known.set(lora, null);
  api.fetchApi(`/iteris/blocks?lora=${encodeURIComponent(lora)}`)
    .then((answer) => answer.json())
    .then((found) => { known.set(lora, found); then(); })
    .catch(() => known.delete(lora));
}

const shownAs = (value) => String(Math.round(value * 1000) / 1000);

// The numbers of a text, or null for one that is no list.
function numbersOf(text, { lists, presets }) {
  const numbers = (presets[text.trim()] ?? text).split(',').map((part) => (part.trim() ? Number(part) : NaN));
  return Object.hasOwn(lists, numbers.length) && numbers.every(Number.isFinite) ? numbers : null;
}

function barOf(name, value) {
  const [bar, fill] = [document.createElement('i'), document.createElement('b')];
  bar.append(fill);
  const show = (weight) => {
    fill.style.height = `${(Math.min(Math.abs(weight), HIGHEST) / HIGHEST) * 100}%`;
    bar.className = weight < 0 ? 'negative' : '';
    bar.dataset.said = `${name} ${shownAs(weight)}`;
  };
  show(value);
  return { bar, show };
}

function bars({ lora, names, numbers, untouched, set }) {
  const values = [...numbers];
  const box = document.createElement('div');
  const said = document.createElement('span');
  said.className = 'hovered';
  box.className = untouched ? 'bars untouched' : 'bars';
  const every = names.map((name, index) => barOf(name, values[index]));
  box.append(...every.map(({ bar }) => bar), said);
  const at = (event) => {
    const { left, top, width, height } = box.getBoundingClientRect();
    const index = Math.floor(((event.clientX - left) / width) * names.length);
    const weight = (1 - (event.clientY - top) / height) * HIGHEST;
    const within = Math.min(HIGHEST, Math.max(0, Math.round(weight / STEP) * STEP));
    return [Math.min(names.length - 1, Math.max(0, index)), within];
  };
  const put = (index, weight) => {
    values[index] = Number(shownAs(weight));
    every[index].show(values[index]);
  };
  let from = null; // the bar and weight of the last move while a button is down
  let fixed = null; // where it went down, until the pointer leaves that place
  const draw = ([index, weight]) => {
    const [start, before] = from ?? [index, weight];
    const steps = Math.abs(index - start);
    for (let step = 0; step <= steps; step++) { // bars that a quick move jumped over lie between
      const share = steps ? step / steps : 1;
      put(start + Math.sign(index - start) * step, Math.round((before + (weight - before) * share) / STEP) * STEP);
    }
    from = [index, weight];
  };
  box.addEventListener('pointerdown', (event) => {
    if (event.button !== 0) return;
    box.setPointerCapture(event.pointerId);
    const [index, weight] = at(event);
    const twice = last?.lora === lora && last.index === index && event.timeStamp - last.time < TWICE;
    last = twice ? null : { lora, index, time: event.timeStamp };
    fixed = { x: event.clientX, y: event.clientY };
    draw([index, twice ? 1 : weight]);
  });
  box.addEventListener('pointermove', (event) => {
    if (fixed && Math.hypot(event.clientX - fixed.x, event.clientY - fixed.y) > NEAR) fixed = last = null;
    if (from && !fixed && event.buttons) draw(at(event));
    said.textContent = every[at(event)[0]].bar.dataset.said;
  });
  box.addEventListener('pointerleave', () => { said.textContent = ''; });
  box.addEventListener('pointerup', () => {
    if (from) set(values.map(shownAs).join(','));
  });
  return box;
}

// The strip of one LoRA: none until its blocks are known, or where the text is no list. `layouts` has
// the list that was chosen for a LoRA without weights.
export function blockStrip({ lora, text, layouts, redraw, set }) {
  if (!known.has(lora)) ask(lora, redraw);
  const found = known.get(lora);
  if (!found) return [];
  const written = text.trim() ? numbersOf(text, found) : null;
  const count = written?.length ?? (text.trim() ? 0 : (layouts.get(lora) ?? found.count));
  const line = document.createElement('div');
  line.className = 'blocks';
  const select = document.createElement('select');
  const counts = Object.keys(found.lists).map(Number);
  for (const one of count ? counts : [0, ...counts]) {
    select.append(new Option(one ? `${one} ${TITLES[one] ?? ''}` : '—', one, false, one === count));
  }
  select.onchange = () => {
    const [names, before] = [found.lists[select.value] ?? [], found.lists[count] ?? []];
    layouts.set(lora, names.length);
    if (!written) return redraw();
    set(names.map((name) => shownAs(written[before.indexOf(name)] ?? 1)).join(','));
  };
  line.append(select);
  if (count) {
    const numbers = written ?? found.lists[count].map(() => 1);
    line.append(bars({ lora, names: found.lists[count], numbers, untouched: !written, set }));
  }
  return [line];
}

// What the front end does for the nodes, with its own widgets only: rows of IterIS LoRAs that are not
// in use are hidden, words are filled in, and lists know of a LoRA that was saved.
import { app } from '../../scripts/app.js';
import { api } from '../../scripts/api.js';

const ROWS = 10;
const NONE = 'none';
const OF_A_ROW = ['on', 'strength', 'clip', 'weight', 'prompts', 'words'];
const TELLING = ['IterisMerge', 'IterisMergeExperts', 'IterisCompareMerges', 'IterisInspectLoras',
  'IterisSaveLora'];
const [WIDTH, LETTER, LINE_HEIGHT, LINES] = [340, 6.4, 17, 2];
const FILLED = 'iteris_filled'; // words that were filled in, by row, and not by the user

const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const linked = (node, name) =>
  node.inputs?.some((input) => input.widget?.name === name && input.link != null);

function setShown(widget, shown) {
  if (!widget) return;
  widget.hidden = !shown;
  widget.options ??= {};
  widget.options.hidden = !shown;
}

// A row that is off is folded; the first row without a LoRA is there to choose one.
function arrange(node) {
  let last = 0;
  let lines = false;
  for (let row = 1; row <= ROWS; row++) {
    if (widgetOf(node, `lora_${row}`)?.value !== NONE || linked(node, `lora_${row}`)) last = row;
  }
  for (let row = 1; row <= ROWS; row++) {
    const chosen = widgetOf(node, `lora_${row}`)?.value !== NONE || linked(node, `lora_${row}`);
    const on = widgetOf(node, `on_${row}`)?.value !== false;
    setShown(widgetOf(node, `lora_${row}`), row <= last + 1);
    for (const part of OF_A_ROW) {
      setShown(widgetOf(node, `${part}_${row}`), chosen && (on || part === 'on'));
    }
    lines ||= chosen && on && widgetOf(node, `prompts_${row}`)?.value === 'lines';
  }
  setShown(widgetOf(node, 'lines'), lines);
  node.setSize([node.size[0], node.computeSize([...node.size])[1]]);
  node.setDirtyCanvas?.(true, true);
}

async function fillIn(node, row) {
  const words = widgetOf(node, `words_${row}`);
  const name = widgetOf(node, `lora_${row}`)?.value;
  const filled = { ...(node.properties[FILLED] ?? {}) };
  if (!words || (words.value && words.value !== filled[row])) return; // the user's own
  const before = words.value;
  let found = { words: '' };
  if (name && name !== NONE) {
    const answer = await api.fetchApi(`/iteris/words?lora=${encodeURIComponent(name)}`);
    if (answer.ok) found = await answer.json();
    // Chosen again, or written by the user, meanwhile.
    if (widgetOf(node, `lora_${row}`)?.value !== name || words.value !== before) return;
  }
  words.value = found.words;
  filled[row] = found.words;
  node.properties[FILLED] = filled;
  node.setDirtyCanvas?.(true, true);
}

// The text on a node is two lines high by itself; reports are longer.
function fitText(id, text) {
  const node = app.graph?.getNodeById?.(id) ?? app.graph?.getNodeById?.(Number(id));
  if (!node?.comfyClass?.startsWith('Iteris')) return;
  const width = node.size[0];
  const inLine = Math.floor((width - 60) / LETTER);
  const lines = String(text).split('\n').reduce((n, l) => n + Math.max(1, Math.ceil(l.length / inLine)), 0);
  const least = node.computeSize([width, 0])[1];
  const height = least + Math.max(0, lines - LINES) * LINE_HEIGHT;
  if (node.size[1] < height) {
    node.setSize([width, height]);
    node.setDirtyCanvas?.(true, true);
  }
}

// After what the widget does by itself; values that come with a graph do not call it.
function whenSet(widget, then) {
  if (!widget) return;
  const before = widget.callback;
  widget.callback = function (...args) {
    const result = before?.apply(this, args);
    then();
    return result;
  };
}

function prepareLoras(node) {
  for (let row = 1; row <= ROWS; row++) {
    whenSet(widgetOf(node, `lora_${row}`), () => {
      arrange(node);
      fillIn(node, row).catch(console.warn);
    });
    for (const part of ['on', 'prompts']) {
      whenSet(widgetOf(node, `${part}_${row}`), () => arrange(node));
    }
  }
  for (const name of ['onConfigure', 'onConnectionsChange']) {
    const before = node[name];
    node[name] = function (...args) {
      const result = before?.apply(this, args);
      arrange(node);
      return result;
    };
  }
  arrange(node);
}

app.registerExtension({
  name: 'iteris',
  nodeCreated(node) {
    if (node.comfyClass === 'IterisLoras') prepareLoras(node);
    // Wide enough for what it will say, before others are put beside it.
    if (TELLING.includes(node.comfyClass)) node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
  },
  setup() {
    api.addEventListener('progress_text', ({ detail }) => {
      // Once the front end has put the text onto the node.
      setTimeout(() => fitText(String(detail?.nodeId ?? '').split(':').pop(), detail?.text ?? ''), 50);
    });
    // Lists of files are made when the page loads; a LoRA that was just saved is not in them.
    api.addEventListener('executed', ({ detail }) => {
      const id = String(detail?.node ?? '').split(':').pop();
      const node = app.graph?.getNodeById?.(id) ?? app.graph?.getNodeById?.(Number(id));
      if (node?.comfyClass === 'IterisSaveLora') app.refreshComboInNodes?.();
    });
  },
});

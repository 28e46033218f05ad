// What the front end does for the nodes: IterIS LoRAs as a list, nodes that show what they do, as high as
// that is and after a reload, and lists that know of a LoRA that was saved.
import { app } from '../../scripts/app.js';
import { api } from '../../scripts/api.js';
import { compareWith, isMerge } from './compare.js';
import { fromLoraList, isLoraList, prepareLoras } from './lora_rows.js';
import { asText, label } from './page_text.js';

const TELLING = ['IterisMerge', 'IterisMergeExperts', 'IterisCompareMerges', 'IterisInspectLoras',
  'IterisSaveLora', 'IterisResizeLora', 'IterisExtractLora'];
const REPORT = 'iteris_report';
let names = []; // of LoRAs, as the page lists them
const [WIDTH, LETTER, LINE_HEIGHT, LINES] = [340, 6.4, 17, 2];

// The node behind an id of the server, such as 5:3 for node 3 of the subgraph that node 5 is.
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const part of String(id ?? '').split(':')) {
    node = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part);
    graph = node?.subgraph;
  }
  return node;
}

const isOurs = (node) => node?.comfyClass?.startsWith('Iteris') ?? false;

// The text on a node is two lines high by itself; reports are longer.
function fitText(node, text) {
  const widget = node.widgets?.find(({ name }) => name === '$$node-text-preview');
  if (widget) widget.serialize = false; // else a graph has it as the value of an input
  const width = node.size[0];
  const inLine = Math.floor((width - 60) / LETTER);
  const lines = text.split('\n').reduce((n, l) => n + Math.max(1, Math.ceil(l.length / inLine)), 0);
  const least = node.computeSize([width, 0])[1];
  const height = least + Math.max(0, lines - LINES) * LINE_HEIGHT;
  if (node.size[1] < height) {
    node.setSize([width, height]);
    node.setDirtyCanvas?.(true, true);
  }
}

function keepNames(defs) {
  const spec = defs.IterisLoras?.input?.optional?.lora_1;
  names = (Array.isArray(spec?.[0]) ? spec[0] : spec?.[1]?.options) ?? names;
}

// A menu of the old front end takes what it lists for HTML.
function labelLists(node) {
  for (const { options } of node.widgets ?? []) {
    if (Array.isArray(options?.values)) options.getOptionLabel = label;
  }
}

// What an input that is gone said, for those in its place.
function inOtherInputs(type, known) {
  if (type === 'IterisCompareMerges' && typeof known.methods === 'string') {
    const rows = known.methods.split(',').map((name) => name.trim()).filter(Boolean);
    for (let row = 1; row <= 6; row++) known[`row_${row}`] = rows[row - 1]?.replace(/^sum$/, 'stacked') ?? 'none';
  }
  if (['IterisResizeLora', 'IterisExtractLora'].includes(type)) {
    known.target ??= ['rank', 'megabytes', 'energy'].find((name) => known[name]);
  }
}

// A saved graph has a node's values by position, which inputs that came or went since have shifted. It
// also names them, unless it is an example of ours; there defaults count if one is of another type.
function renew(saved) {
  const widgets = window.LiteGraph.createNode(saved.type)?.widgets?.filter((widget) => widget.serialize !== false) ?? [];
  const values = saved.widgets_values;
  const old = saved.inputs?.filter((input) => input.widget) ?? [];
  if (old.some((input) => input.link == null)) { // an example names those that are linked
    const known = Object.fromEntries(old.map(({ widget }, index) => [widget.name, values[index]]));
    inOtherInputs(saved.type, known);
    saved.widgets_values = widgets.map(({ name, value }) => known[name] ?? value);
  } else if (widgets.some(({ value }, index) => index in values && typeof value !== typeof values[index])) {
    saved.widgets_values = widgets.map(({ value }) => value);
    const detail = `Node ${saved.id} was saved by a version with other inputs. It has its defaults now; set it anew.`;
    app.extensionManager.toast.add({ severity: 'warn', summary: saved.title ?? saved.type, detail });
  }
}

// The front end looks for the number in the graph that is in view, whatever node has it there: nodes of
// another graph, such as a subgraph, wait until theirs is.
function show(node, text) {
  if (!isOurs(node) || node.graph !== app.canvas.graph) return;
  api.dispatchCustomEvent('progress_text', { nodeId: String(node.id), text: asText(text) });
  fitText(node, text);
}

// A graph may come from anybody, and name anything a report.
function showReport(node) {
  const text = node.properties?.[REPORT];
  if (TELLING.includes(node.comfyClass) && typeof text === 'string' && text) show(node, text);
}

const everyNode = (saved) => [saved?.nodes, ...(saved?.definitions?.subgraphs ?? []).map((one) => one.nodes)]
  .flat().filter((node) => node?.type?.startsWith('Iteris'));
const openTab = () => app.extensionManager?.workflow?.activeWorkflow;
const tabs = new WeakMap(); // reports of runs of a tab that was not open then, by node
const runs = new Map(); // id of a run → its tab

// False for a run of another tab, whose nodes have the same numbers. One that began before the page was
// loaded is taken for one of the open tab.
function isOfOpenTab(id) {
  const tab = runs.get(id);
  return !tab || tab === openTab();
}

// A picture is made before its run's reports: it must not carry those of the run before.
function followRuns() {
  const queue = api.queuePrompt;
  api.queuePrompt = async function (number, data, ...more) {
    for (const node of everyNode(data?.workflow)) {
      const { [REPORT]: _, ...others } = node.properties ?? {};
      node.properties = others;
    }
    const tab = openTab();
    const made = await queue.call(this, number, data, ...more);
    if (tab && made?.prompt_id) runs.set(made.prompt_id, tab);
    return made;
  };
}

function tell(id, text) {
  const node = nodeOf(id);
  if (!TELLING.includes(node?.comfyClass)) return;
  node.properties[REPORT] = text;
  showReport(node);
  // Lists of files are made when the page loads; a LoRA that was just saved is not in them.
  const isNew = !names.includes(text.split('\n')[0]);
  if (node.comfyClass === 'IterisSaveLora' && isNew) app.refreshComboInNodes?.();
}

app.registerExtension({
  name: 'iteris',
  addCustomNodeDefs: keepNames,
  refreshComboInNodes: keepNames,
  beforeConfigureGraph(graph) {
    for (const saved of everyNode(graph)) {
      if (Array.isArray(saved.widgets_values)) renew(saved);
    }
  },
  loadedGraphNode(node) {
    setTimeout(() => showReport(node), 0);
  },
  nodeCreated(node) {
    if (isOurs(node)) labelLists(node);
    if (node.comfyClass === 'IterisLoras') prepareLoras(node);
    // Wide enough for what it will say, before others are put beside it.
    if (TELLING.includes(node.comfyClass)) node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
  },
  getNodeMenuItems(node) {
    return [
      isLoraList(node) && { content: 'To IterIS LoRAs', callback: () => fromLoraList(node) },
      isMerge(node) && { content: 'Compare with each LoRA alone', callback: () => compareWith(node) },
    ].filter(Boolean);
  },
  setup() {
    // The old front end scrolls a text from 200 pixels on, however high the node is.
    const style = document.createElement('style');
    style.textContent = '.dom-widget > .max-h-\\[200px\\] { max-height: 100%; }';
    document.head.append(style);
    api.addEventListener('iteris.text', ({ detail }) => {
      if (isOfOpenTab(detail.prompt_id)) show(nodeOf(detail.node), detail.text);
    });
    api.addEventListener('executed', ({ detail }) => {
      const text = detail?.output?.text?.[0];
      if (typeof text !== 'string' || !text) return;
      const tab = runs.get(detail.prompt_id);
      if (isOfOpenTab(detail.prompt_id)) tell(detail.node, text);
      else tabs.set(tab, { ...tabs.get(tab), [detail.node]: text });
    });
    app.canvas.canvas.addEventListener('litegraph:set-graph', () => {
      setTimeout(() => app.canvas.graph?._nodes.forEach(showReport), 0);
    });
    followRuns();
  },
  afterConfigureGraph() {
    setTimeout(() => { // once the tab is the open one
      const tab = openTab();
      for (const [id, text] of Object.entries((tab && tabs.get(tab)) ?? {})) tell(id, text);
      if (tab) tabs.delete(tab);
    }, 500);
  },
});

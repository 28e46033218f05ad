// What the front end does for the nodes: IterIS LoRAs as a list, nodes as high as what they report,
// and lists that know of a LoRA that was saved.
import { app } from '../../scripts/app.js';
import { api } from '../../scripts/api.js';
import { fromLoraList, isLoraList, prepareLoras } from './lora_rows.js';

const TELLING = ['IterisMerge', 'IterisMergeExperts', 'IterisCompareMerges', 'IterisInspectLoras',
  'IterisSaveLora'];
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

// The text on a node is two lines high by itself; reports are longer.
function fitText(node, text) {
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

app.registerExtension({
  name: 'iteris',
  nodeCreated(node) {
    if (node.comfyClass === 'IterisLoras') prepareLoras(node);
    // Wide enough for what it will say, before others are put beside it.
    if (TELLING.includes(node.comfyClass)) node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
  },
  getNodeMenuItems(node) {
    return isLoraList(node) ? [{ content: 'To IterIS LoRAs', callback: () => fromLoraList(node) }] : [];
  },
  setup() {
    api.addEventListener('progress_text', ({ detail }) => {
      // Once the front end has put the text onto the node.
      setTimeout(() => fitText(nodeOf(detail?.nodeId), detail?.text ?? ''), 50);
    });
    // Lists of files are made when the page loads; a LoRA that was just saved is not in them.
    api.addEventListener('executed', ({ detail }) => {
      if (nodeOf(detail?.node)?.comfyClass === 'IterisSaveLora') app.refreshComboInNodes?.();
    });
  },
});

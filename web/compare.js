// A merge beside each LoRA alone and all of them stacked: from IterIS Merge LoRAs, in one press, the rest of
// workflows/compare_methods.json with the prompts and the sampler that the merge has already.
const GAP = 60;
const COPIED = ['samples', 'seed', 'preset', 'minutes'];
const MERGE = 'IterisMerge';
const SHEET = [640, 560]; // of the picture

const slotOf = (node, name) => node.inputs.findIndex((input) => input.name === name);
const outputOf = (node, name) => node.outputs.findIndex((output) => output.name === name);
const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const targetsOf = (node, slot) => node.getOutputNodes(slot) ?? [];
const below = ({ pos, size }) => [pos[0], pos[1] + size[1] + GAP];
const beside = ({ pos, size }) => [pos[0] + size[0] + GAP, pos[1]];
export const isMerge = (node) => node?.comfyClass === MERGE;

// Below all that is there; what grows by its report has nothing below it.
function free(merge) {
  const { _nodes: nodes, _groups: groups } = merge.graph;
  const bottom = Math.max(...[...nodes, ...groups].map(({ pos, size }) => pos[1] + size[1]));
  return [merge.pos[0], bottom + 2 * GAP];
}

function add(graph, type, pos, title) {
  const made = window.LiteGraph.createNode(type);
  made.pos = pos;
  if (title) made.title = title;
  graph.add(made);
  return made;
}

const linkOf = (graph, node, name) => {
  const id = node?.inputs[slotOf(node, name)]?.link;
  return id == null ? null : graph.getLink?.(id) ?? graph.links[id];
};

// What a node has on an input, on the same input of another one.
function link(graph, from, to, name) {
  const found = linkOf(graph, from, name);
  if (found) graph.getNodeById(found.origin_id).connect(found.origin_slot, to, slotOf(to, name));
}

// A prompt that reads the merged CLIP, read by the CLIP of each row. One that another node gives may be
// a list, which ComfyUI would pair with the rows by place: of such a list each is drawn by every row.
function prompt(graph, sampler, name, compare, pos) {
  const known = graph.getNodeById(linkOf(graph, sampler, name)?.origin_id);
  const made = add(graph, 'CLIPTextEncode', pos, name === 'positive' ? 'Prompt' : 'Negative prompt');
  if (known?.type === 'CLIPTextEncode') {
    widgetOf(made, 'text').value = widgetOf(known, 'text').value;
    const given = linkOf(graph, known, 'text');
    if (given && name === 'positive') {
      graph.getNodeById(given.origin_id).connect(given.origin_slot, compare, slotOf(compare, 'prompt'));
      compare.connect(outputOf(compare, 'prompts'), made, slotOf(made, 'text'));
    } else link(graph, known, made, 'text');
  }
  compare.connect(outputOf(compare, 'CLIP'), made, slotOf(made, 'clip'));
  return made;
}

export function compareWith(merge) {
  const graph = merge.graph;
  const compare = add(graph, 'IterisCompareMerges', free(merge));
  for (const { name } of merge.inputs) {
    if (slotOf(compare, name) >= 0 && !widgetOf(compare, name)) link(graph, merge, compare, name);
  }
  for (const name of COPIED) widgetOf(compare, name).value = widgetOf(merge, name).value;
  const rows = [1, 2, 3, 4, 5, 6].map((number) => widgetOf(compare, `row_${number}`));
  const method = widgetOf(merge, 'method')?.value;
  if (method && !rows.some(({ value }) => value === method)) rows[3].value = method;
  const old = targetsOf(merge, 0).find(({ type }) => type === 'KSampler');
  const positive = prompt(graph, old, 'positive', compare, beside(compare));
  const negative = prompt(graph, old, 'negative', compare, below(positive));
  const sampler = add(graph, 'KSampler', beside(positive));
  for (const widget of old?.widgets ?? []) {
    const own = widgetOf(sampler, widget.name);
    if (own) own.value = widget.value;
  }
  compare.connect(outputOf(compare, 'MODEL'), sampler, slotOf(sampler, 'model'));
  positive.connect(0, sampler, slotOf(sampler, 'positive'));
  negative.connect(0, sampler, slotOf(sampler, 'negative'));
  const decode = add(graph, 'VAEDecode', below(sampler));
  sampler.connect(0, decode, slotOf(decode, 'samples'));
  if (old) {
    link(graph, old, sampler, 'latent_image');
    const decoded = targetsOf(old, 0).find(({ type }) => type === 'VAEDecode');
    if (decoded) link(graph, decoded, decode, 'vae');
  }
  const sheet = add(graph, 'IterisScoreSheet', beside(sampler));
  decode.connect(0, sheet, slotOf(sheet, 'images'));
  compare.connect(outputOf(compare, 'labels'), sheet, slotOf(sheet, 'labels'));
  if (compare.inputs[slotOf(compare, 'prompt')].link != null) {
    compare.connect(outputOf(compare, 'prompts'), sheet, slotOf(sheet, 'prompts'));
  }
  const shown = add(graph, 'PreviewImage', beside(sheet), 'One row per way');
  shown.setSize([...SHEET]);
  sheet.connect(0, shown, 0);
}

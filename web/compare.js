// A merge beside each LoRA alone and all of them stacked: from IterIS Merge, in one press, the rest of
// workflows/compare_methods.json with the prompts and the sampler that the merge has already.
const GAP = 60;
const COPIED = ['samples', 'seed', 'preset', 'minutes'];
const MERGE = 'IterisMerge';

const slotOf = (node, name) => node.inputs.findIndex((input) => input.name === name);
const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);
const targetsOf = (node, slot) => node.getOutputNodes(slot) ?? [];
const below = ({ pos, size }) => [pos[0], pos[1] + size[1] + GAP];
const beside = ({ pos, size }) => [pos[0] + size[0] + GAP, pos[1]];
export const isMerge = (node) => node?.comfyClass === MERGE;

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

// A prompt that reads the merged CLIP, read by the CLIP of each row.
function prompt(graph, sampler, name, compare, pos) {
  const known = graph.getNodeById(linkOf(graph, sampler, name)?.origin_id);
  const made = add(graph, 'CLIPTextEncode', pos, name === 'positive' ? 'Prompt' : 'Negative prompt');
  if (known?.type === 'CLIPTextEncode') {
    widgetOf(made, 'text').value = widgetOf(known, 'text').value;
    link(graph, known, made, 'text');
  }
  compare.connect(1, made, slotOf(made, 'clip'));
  return made;
}

export function compareWith(merge) {
  const graph = merge.graph;
  const compare = add(graph, 'IterisCompareMerges', below(merge));
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
  compare.connect(0, sampler, slotOf(sampler, 'model'));
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
  compare.connect(2, sheet, slotOf(sheet, 'labels'));
  sheet.connect(0, add(graph, 'PreviewImage', below(sheet), 'One row per way'), 0);
}

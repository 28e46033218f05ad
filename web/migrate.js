// Old graphs. Of before IterIS Settings: what the merging nodes had as inputs of their own goes onto such
// a node, as far as it is not a default. Works on the JSON of a graph, in place.

const LATENTS = ['timesteps', 'latent_size', 'latents'];
const REST = ['memory', 'frames', 'empty_prompts', 'cannot_merge'];
const MERGE = ['method', 'samples', 'seed', 'schedule', 'ridge', 'weighting', 'repair',
  ...LATENTS, 'rank', 'dtype', 'preset', ...REST];
const BEFORE = {
  IterisMerge: MERGE,
  IterisMergeExperts: ['boundary', ...MERGE],
  IterisCompareMerges: ['methods', 'samples', 'seed', ...LATENTS, ...REST],
};
const NOW = {
  IterisMerge: ['method', 'preset', 'samples', 'seed', 'strength'],
  IterisMergeExperts: ['boundary', 'method', 'preset', 'samples', 'seed', 'strength'],
  IterisCompareMerges: ['methods', 'samples', 'seed', 'preset'],
};
const USUAL = {
  preset: 'default', samples: 0, seed: 0, strength: 1, method: 'iteris', boundary: 0.875,
};
const [STRENGTH, CLIP_STRENGTH, SAME] = [3, 7, -11]; // of IterIS Concept
export const SETTINGS = {
  timesteps: 4, latents: 'denoising', latent_size: 0, frames: 0, denoising_steps: 10, guidance: 1,
  empty_share: 0.2, empty_prompts: 'auto', cannot_merge: 'refuse', memory: 0, rank: 0, repair: true,
  repair_inputs: 0, schedule: 'sweep', iterations: 10, tolerance: 0, objective: 'output',
  weighting: 'tokens', ridge: 0, shrink: 1, saliency: -1, row_tokens: 0, precision: 'float32',
  density: 0, scale: 0,
};

export function migrate(graph) {
  for (const node of [...(graph.nodes ?? [])]) {
    if (node.type === 'IterisConcept') clipStrength(node.widgets_values);
    const before = BEFORE[node.type];
    const values = node.widgets_values;
    if (!before || !Array.isArray(values) || values.length <= NOW[node.type].length) continue;
    const given = Object.fromEntries(values.slice(0, before.length).map((v, i) => [before[i], v]));
    node.widgets_values = NOW[node.type].map((name) => given[name] ?? USUAL[name]);
    node.inputs = (node.inputs ?? []).filter(
      (input) => !input.widget || NOW[node.type].includes(input.widget.name),
    );
    saveAs(graph, node, given.dtype);
    const own = Object.keys(SETTINGS).filter((n) => n in given && given[n] !== SETTINGS[n]);
    if (own.length) connect(graph, node, { ...SETTINGS, ...pick(given, own) });
    place(graph, node);
  }
  return graph;
}

// Of graphs of before -11 was no longer the same as strength, or without one of its own.
function clipStrength(values) {
  if (!Array.isArray(values)) return;
  if (values.length === CLIP_STRENGTH || values[CLIP_STRENGTH] === SAME) {
    values[CLIP_STRENGTH] = values[STRENGTH];
  }
}

const pick = (table, names) => Object.fromEntries(names.map((name) => [name, table[name]]));

function saveAs(graph, node, dtype) {
  if (!dtype || dtype === 'float16') return;
  const from = (node.outputs ?? []).filter((o) => o.type === 'LORA_MODEL').flatMap((o) => o.links ?? []);
  for (const link of graph.links.filter((l) => from.includes(l[0]))) {
    const save = graph.nodes.find((n) => n.id === link[3] && n.type === 'IterisSaveLora');
    if (save) save.widgets_values = [...[...(save.widgets_values ?? []), 'iteris/merged', 0].slice(0, 2), dtype];
  }
}

function connect(graph, node, settings) {
  const id = (graph.last_node_id ?? Math.max(...graph.nodes.map((n) => n.id))) + 1;
  const link = (graph.last_link_id ?? Math.max(0, ...graph.links.map((l) => l[0]))) + 1;
  Object.assign(graph, { last_node_id: id, last_link_id: link });
  graph.nodes.push({
    id, type: 'IterisSettings', pos: [node.pos[0] - 380, node.pos[1]], size: [340, 640], flags: {},
    order: 0, mode: node.mode ?? 0, inputs: [],
    outputs: [{ name: 'settings', type: 'ITERIS_SETTINGS', links: [link] }],
    properties: { 'Node name for S&R': 'IterisSettings' },
    widgets_values: Object.values(settings),
  });
  node.inputs.push({ name: 'settings', type: 'ITERIS_SETTINGS', link });
  graph.links.push([link, id, 0, node.id, node.inputs.length - 1, 'ITERIS_SETTINGS']);
}

// Inputs that are gone move the others up.
function place(graph, node) {
  node.inputs.forEach((input, slot) => {
    const link = graph.links.find((l) => l[0] === input.link);
    if (link) link[4] = slot;
  });
}

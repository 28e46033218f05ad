// node people.js PORT GRAPH.json: two browsers on one server. The first runs the graph, then opens another
// one in a second tab while it runs, and then cancels a run in its steps; the second has a graph of
// somebody else's open, whose nodes have the same numbers. Prints, as JSON, what reached whom.
const fs = require('fs');
const { idle, withPage } = require('./browser.js');

const [port, graph] = process.argv.slice(2);
const base = `http://127.0.0.1:${port}`;
const data = JSON.parse(fs.readFileSync(graph));
const ids = data.nodes.map(({ id }) => id);
const EVENTS = ['iteris.text', 'progress_text', 'progress', 'progress_state', 'executing', 'executed', 'b_preview', 'b_preview_with_metadata'];

// As many nodes as the graph has, under its numbers; every other one is ours.
const strangers = { last_node_id: Math.max(...ids), last_link_id: 0, links: [], version: 0.4,
  nodes: ids.map((id, order) => ({
    id, type: order % 2 ? 'IterisMerge' : 'DualCLIPLoader', pos: [400 * (order % 5), 450 * Math.floor(order / 5)],
    size: [340, 300], flags: {}, order, mode: 0, inputs: [], outputs: [], properties: {},
  })) };
const others = { ...strangers, nodes: strangers.nodes.map((node) => ({ ...node, type: 'DualCLIPLoader' })) };

const load = async (page, what, name) => {
  await page.evaluate(([d, n]) => window.app.loadGraphData(d, true, true, n), [what, name]);
  await page.waitForTimeout(1500);
};
// But for sizes: ComfyUI itself puts a picture of a run onto the node with its number in the open tab.
const saved = (page) => page.evaluate(() => JSON.stringify(
  window.app.graph.serialize().nodes.map(({ id, properties, widgets_values: values }) => [id, properties, values])));
const text = (page) => page.locator('body').innerText();
// The texts on nodes, of the graph that is in view.
const told = (page) => page.evaluate(() => window.app.graph._nodes.flatMap((node) =>
  (node.widgets ?? []).filter(({ name }) => name === '$$node-text-preview').map(({ value }) => `${node.type}: ${value}`)));
const start = (page) => page.evaluate(() => window.app.queuePrompt(0, 1));
const until = async (page, pattern) => {
  for (let tries = 0; tries < 600 && !pattern.test(await text(page)); tries++) await page.waitForTimeout(200);
};

withPage(base, async (mine, errors) => withPage(base, async (theirs) => {
  await theirs.evaluate(async (kinds) => {
    const { api } = await import('/scripts/api.js');
    window.heard = [];
    for (const kind of kinds) api.addEventListener(kind, () => window.heard.push(kind));
  }, EVENTS);
  await load(theirs, strangers, 'theirs');
  await load(mine, data, 'first');
  await mine.evaluate(() => { // a merge that no other test made
    const { widgets } = window.app.graph._nodes.find(({ type }) => type === 'IterisMerge');
    for (const [name, value] of [['seed', 4711], ['samples', 12]]) widgets.find((one) => one.name === name).value = value;
  });
  const seen = { before: await saved(theirs) };
  await start(mine);
  await until(mine, /no row left out/);
  seen.running = await told(mine);
  await load(mine, others, 'others');
  const before = await saved(mine);
  await idle(mine, base);
  seen.others = { told: await told(mine), same: before === await saved(mine) };
  await mine.getByText('first', { exact: true }).first().click();
  await mine.waitForTimeout(2500);
  seen.done = await told(mine);

  await mine.evaluate(() => {
    const { app, LiteGraph } = window;
    const merge = app.graph._nodes.find(({ type }) => type === 'IterisMerge');
    const settings = LiteGraph.createNode('IterisSettings');
    app.graph.add(settings);
    settings.widgets.find(({ name: of }) => of === 'steps').value = 200;
    settings.connect(0, merge, merge.inputs.findIndex(({ name: of }) => of === 'settings'));
  });
  await start(mine);
  await until(mine, /teps through the denoiser \d+ of/);
  seen.steps = await told(mine);
  await fetch(`${base}/interrupt`, { method: 'POST' });
  await idle(mine, base);
  seen.stopped = await told(mine);

  seen.theirs = { told: await told(theirs), same: seen.before === await saved(theirs), heard: await theirs.evaluate(() => window.heard) };
  delete seen.before;
  console.log(JSON.stringify({ ...seen, errors }));
})).catch((error) => {
  console.error(error);
  process.exit(1);
});

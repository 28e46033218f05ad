// node reports.js PORT GRAPH.json ID: where a report of a graph and one of a run are shown. ID is a node
// of ours outside the graph's subgraph. Prints, as JSON, the text on the page outside and inside the
// subgraph, what the front end would put into a picture, and what nodes have after a run ended while
// another graph was open.
const fs = require('fs');
const { withPage } = require('./browser.js');

const [port, graph, id] = process.argv.slice(2);

withPage(`http://127.0.0.1:${port}`, async (page, errors) => {
  const load = async (data, name) => {
    await page.evaluate(([d, n]) => window.app.loadGraphData(d, true, true, n), [data, name]);
    await page.waitForTimeout(1500);
  };
  const text = () => page.locator('body').innerText();
  const report = () => page.evaluate((n) => window.app.rootGraph.getNodeById(n)?.properties.iteris_report ?? null, Number(id));
  await load(JSON.parse(fs.readFileSync(graph)), 'first');
  const seen = { outside: await text() };
  await page.evaluate(() => {
    const { app } = window;
    const outer = app.rootGraph._nodes.find((node) => node.subgraph);
    app.canvas.openSubgraph(outer.subgraph, outer);
  });
  await page.waitForTimeout(1000);
  seen.inside = await text();
  await page.evaluate(() => window.app.canvas.setGraph(window.app.rootGraph));
  await page.route('**/prompt', (route) => {
    if (route.request().method() !== 'POST') return route.continue();
    seen.sent = JSON.stringify(route.request().postDataJSON().extra_data.extra_pnginfo.workflow);
    return route.fulfill({ json: { prompt_id: 'of-the-first', number: 1, node_errors: {} } });
  });
  await page.evaluate(() => window.app.queuePrompt(0));
  await page.waitForTimeout(1000);
  const other = { last_node_id: Number(id), last_link_id: 0, links: [], version: 0.4, nodes: [{
    id: Number(id), type: 'IterisMerge', pos: [0, 0], size: [300, 300], flags: {}, order: 0, mode: 0,
    inputs: [], outputs: [], properties: {},
  }] };
  await load(other, 'other');
  await page.evaluate(async (n) => {
    const { api } = await import('/scripts/api.js');
    const output = { text: ['a report that came late'] };
    api.dispatchCustomEvent('executed', { node: n, display_node: n, prompt_id: 'of-the-first', output });
  }, id);
  await page.waitForTimeout(1000);
  seen.other = await report();
  await page.getByText('first', { exact: true }).first().click();
  await page.waitForTimeout(2500);
  seen.first = await report();
  console.log(JSON.stringify({ ...seen, errors }));
}).catch((error) => {
  console.error(error);
  process.exit(1);
});

// node comparison.js PORT GRAPH.json: what a press on "Compare with each LoRA alone" of the graph's merge adds,
// and what the search finds for "merge loras". Prints, as JSON, the nodes' boxes, the new ones apart, what the
// front end would send, and what was found.
const fs = require('fs');
const { withPage } = require('./browser.js');

const [port, graph] = process.argv.slice(2);

withPage(`http://127.0.0.1:${port}`, async (page, errors) => {
  await page.evaluate((data) => window.app.loadGraphData(data, true, true, 'graph'), JSON.parse(fs.readFileSync(graph)));
  await page.waitForTimeout(2000);
  const seen = await page.evaluate(async () => {
    const { app } = window;
    const before = [...app.graph._nodes];
    const merge = before.find(({ type }) => type === 'IterisMerge');
    app.canvas.getNodeMenuOptions(merge).find((one) => one?.content === 'Compare with each LoRA alone').callback();
    await new Promise((done) => { setTimeout(done, 1000); });
    const box = ({ id, type, pos, size }) => ({ id, type, box: [pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]] });
    return {
      before: before.map(box),
      added: app.graph._nodes.filter((node) => !before.includes(node)).map(box),
      prompt: (await app.graphToPrompt()).output,
    };
  });
  await page.evaluate(() => window.app.graph.clear());
  await page.mouse.dblclick(900, 500);
  const search = page.locator('.comfy-vue-node-search-container input, [role="dialog"] input').first();
  await search.fill('merge loras');
  await page.waitForTimeout(1500);
  const found = await page.locator('.comfy-vue-node-search-container, [role="dialog"], .p-autocomplete-overlay').allInnerTexts();
  console.log(JSON.stringify({ ...seen, found: found.join('\n'), errors }));
}).catch((error) => {
  console.error(error);
  process.exit(1);
});

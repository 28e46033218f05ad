// node blueprint.js PORT BLUEPRINT.json: the blueprint as it is once dropped, with the Toybox before it
// and a preview behind it. Prints, as JSON, its widgets, what the front end would send, and the
// blueprints that the server lists.
const fs = require('fs');
const { withPage } = require('./browser.js');

const [port, file] = process.argv.slice(2);
const base = `http://127.0.0.1:${port}`;
const LINKS = [['MODEL', 'model'], ['CLIP', 'clip'], ['VAE', 'vae'], ['concepts', 'concepts']];

withPage(base, async (page, errors) => {
  const seen = await page.evaluate(async ([data, links]) => {
    await window.app.loadGraphData(data, true, true, 'blueprint');
    const { graph } = window.app;
    const [dropped] = graph._nodes;
    const add = (type, x) => {
      const node = window.LiteGraph.createNode(type);
      node.pos = [x, 0];
      graph.add(node);
      return node;
    };
    const [toybox, preview] = [add('IterisToybox', -500), add('PreviewImage', 500)];
    const at = (slots, name) => slots.findIndex((slot) => slot.name === name);
    for (const [from, to] of links) {
      toybox.connect(at(toybox.outputs, from), dropped, at(dropped.inputs, to));
    }
    dropped.connect(0, preview, 0);
    const answer = await fetch('/global_subgraphs');
    return {
      widgets: dropped.widgets.map((widget) => widget.name),
      prompt: (await window.app.graphToPrompt()).output,
      listed: answer.ok ? Object.values(await answer.json()).map((one) => one.name) : [],
    };
  }, [JSON.parse(fs.readFileSync(file)), LINKS]);
  console.log(JSON.stringify({ ...seen, errors }));
}).catch((error) => {
  console.error(error);
  process.exit(1);
});

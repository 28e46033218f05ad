// node front_end.js PORT GRAPH.json PICTURE.png [set VALUES] [run] [prompt] [vue] [menus] [help NODE_TYPE]
// Opens a graph in ComfyUI's own front end in headless Chromium and prints, as JSON, what the user
// would see: node types that are missing, toasts, and the text of the help panel. "set" gives nodes
// values, as JSON by type of node and name of widget. With "run" it
// presses the Run button and waits for the server to be idle again; with "prompt" it also prints what
// the front end would send to the server; with "vue" nodes are drawn as Nodes 2.0, and it prints where
// they stand; with "menus" it opens every list of files of ours, and prints their entries. "hostile" says
// what a text did that the page took for HTML.
const fs = require('fs');
const path = require('path');
const { RUN, idle, withPage } = require('./browser.js');

const [port, graph, picture, ...wishes] = process.argv.slice(2);
const base = `http://127.0.0.1:${port}`;

async function open(page) {
  const data = JSON.parse(fs.readFileSync(graph));
  const name = path.basename(graph, '.json');
  await page.evaluate(([d, n]) => window.app.loadGraphData(d, true, true, n), [data, name]);
  await page.waitForTimeout(2000);
}

async function set(page, values) {
  await page.evaluate((given) => {
    for (const node of window.app.graph._nodes) {
      for (const [name, value] of Object.entries(given[node.type] ?? {})) {
        const widget = node.widgets.find((one) => one.name === name);
        widget.value = value;
        widget.callback?.(value);
      }
    }
  }, values);
}

async function run(page) {
  await page.click(RUN);
  await idle(page, base);
  await page.waitForTimeout(2000);
}

// Lists of files on nodes of ours, one after another; as drawn on the canvas, or in the page.
async function menus(page, picture) {
  const seen = [];
  const read = async (name) => {
    await page.waitForTimeout(1000);
    seen.push(...await page.locator('.litemenu-entry, [role="option"]').allTextContents());
    await page.screenshot({ path: picture.replace('.png', `_${name}.png`) });
    await page.keyboard.press('Escape');
    await page.evaluate(() => document.querySelectorAll('.litecontextmenu').forEach((menu) => menu.remove()));
  };
  await page.locator('.iteris-loras .add').first().click();
  await read('list');
  const spot = await page.evaluate(() => {
    const { canvas, graph: shown } = window.app;
    const node = shown._nodes.find((one) => one.type === 'IterisConcept');
    const widget = node.widgets.find((one) => one.name === 'lora_name');
    // What a run complains of lies over the right of the page.
    window.before = [...canvas.ds.offset];
    canvas.ds.offset = [150 / canvas.ds.scale - node.pos[0], 300 / canvas.ds.scale - node.pos[1]];
    canvas.setDirty(true, true);
    const box = canvas.canvas.getBoundingClientRect();
    const [x, y] = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10];
    return { id: node.id, at: [box.left + (x + canvas.ds.offset[0]) * canvas.ds.scale, box.top + (y + canvas.ds.offset[1]) * canvas.ds.scale] };
  });
  await page.waitForTimeout(500);
  const inPage = page.locator(`[data-node-id="${spot.id}"] [role="combobox"]`).first();
  if (await inPage.count()) await inPage.click();
  else await page.mouse.click(...spot.at);
  await read('concept');
  await page.evaluate(() => {
    window.app.canvas.ds.offset = window.before;
    window.app.canvas.setDirty(true, true);
  });
  await page.waitForTimeout(1000);
  return seen;
}

async function help(page, type) {
  await page.evaluate((t) => {
    const found = window.app.graph._nodes.find((node) => node.type === t);
    // The button floats above the node and must be in sight.
    window.app.canvas.ds.scale = 0.9;
    window.app.canvas.ds.offset = [300 - found.pos[0], 300 - found.pos[1]];
    window.app.canvas.selectNode(found);
    window.app.canvas.setDirty(true, true);
  }, type);
  await page.click('[data-testid="info-button"]', { timeout: 20000 });
  await page.waitForTimeout(3000);
}

withPage(base, async (page, errors) => {
  await open(page);
  if (wishes.includes('set')) await set(page, JSON.parse(wishes[wishes.indexOf('set') + 1]));
  if (wishes.includes('run')) await run(page);
  if (wishes.includes('help')) await help(page, wishes[wishes.indexOf('help') + 1]);
  else {
    await page.evaluate(() => {
      const { canvas, graph: shown } = window.app;
      const left = Math.min(...shown._nodes.map((n) => n.pos[0]));
      const top = Math.min(...shown._nodes.map((n) => n.pos[1]));
      const right = Math.max(...shown._nodes.map((n) => n.pos[0] + n.size[0]));
      const bottom = Math.max(...shown._nodes.map((n) => n.pos[1] + n.size[1]));
      // Titles stand above the nodes, and the front end's own bars cover the edges.
      canvas.ds.scale = Math.min(1580 / (right - left), 770 / (bottom - top), 1);
      canvas.ds.offset = [90 / canvas.ds.scale - left, 150 / canvas.ds.scale - top];
      canvas.setDirty(true, true);
    });
  }
  await page.waitForTimeout(1500);
  await page.screenshot({ path: picture });
  const entries = wishes.includes('menus') ? await menus(page, picture) : [];
  const seen = await page.evaluate(() => ({
    // Later front ends also mark a loader whose file is not there, and offer to download it.
    missing: window.app.graph._nodes.filter((n) => n.has_errors && !(n.properties?.models && window.LiteGraph.registered_node_types[n.type])).map((n) => n.type),
    nodes: window.app.graph._nodes.length,
    toasts: [...document.querySelectorAll('.p-toast-message')].map((e) => e.innerText),
    dialogs: [...document.querySelectorAll('.p-dialog')].map((e) => e.innerText.slice(0, 300)),
    text: document.body.innerText.slice(0, 6000),
    hostile: [
      window.hostile, ...[...document.querySelectorAll('[src*="hostile"], [href*="hostile"]')].map((e) => e.outerHTML),
    ].filter(Boolean),
    pictures: [...document.querySelectorAll('img[src*="iteris-lora/docs"]')].map((e) => [
      new URL(e.src).pathname.replace(/\/+/g, '/'), e.naturalWidth > 0,
    ]),
    values: Object.fromEntries(
      window.app.graph._nodes.map((n) => [
        n.type, Object.fromEntries((n.widgets ?? []).map((w) => [w.name, w.value])),
      ]),
    ),
    drawn: [...document.querySelectorAll('[data-node-id]')].map((e) => {
      const { left, top, right, bottom } = e.getBoundingClientRect();
      return [Number(e.dataset.nodeId), [left, top, right, bottom].map((v) => v / window.app.canvas.ds.scale)];
    }),
    linked: Object.fromEntries(
      window.app.graph._nodes
        .map((n) => [n.type, (n.inputs ?? []).filter((i) => i.link != null).map((i) => i.name)])
        .filter(([, names]) => names.length),
    ),
  }));
  const prompt = wishes.includes('prompt')
    ? await page.evaluate(async () => (await window.app.graphToPrompt()).output)
    : null;
  console.log(JSON.stringify({ ...seen, entries, errors, prompt }));
}, { 'Comfy.VueNodes.Enabled': wishes.includes('vue') }).catch((error) => {
  console.error(error);
  process.exit(1);
});

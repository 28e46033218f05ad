// node graph_pictures.js PORT NAME[=FILE] …: pictures of graphs as they open, workflows/NAME.jpg, for
// those whose models are not there to draw one; with =FILE, wider, of a graph that was run. Of a
// ComfyUI that runs on that port.
const fs = require('fs');
const { join } = require('path');
const { withPage } = require('./browser.js');

const [port, ...names] = process.argv.slice(2);
const FOLDER = join(__dirname, '..', '..', 'workflows');
const [LEFT, TOP, MARGIN] = [90, 150, 10]; // clear of the front end's own bars
const [WIDTH, WIDE] = [1100, 1500];

async function run(page) {
  // What is computed already would say nothing on its node.
  const body = JSON.stringify({ unload_models: true, free_memory: true });
  await fetch(`http://127.0.0.1:${port}/free`, { method: 'POST', body });
  await page.waitForTimeout(2000);
  await page.evaluate(() => window.app.queuePrompt(0, 1));
  let waiting = 1;
  while (waiting) {
    await page.waitForTimeout(3000);
    const queue = await (await fetch(`http://127.0.0.1:${port}/queue`)).json();
    waiting = queue.queue_running.length + queue.queue_pending.length;
  }
}

withPage(`http://127.0.0.1:${port}`, async (page) => {
  for (const asked of names) {
    const [name, result] = asked.split('=');
    const width = result ? WIDE : WIDTH;
    const file = join(FOLDER, `${name}.json`);
    const data = JSON.parse(fs.readFileSync(file));
    await page.evaluate(([d, n]) => window.app.loadGraphData(d, true, true, n), [data, name]);
    await page.waitForTimeout(2000);
    if (result) await run(page);
    const boxes = data.groups.map((group) => group.bounding);
    const left = Math.min(...boxes.map(([x]) => x)) - MARGIN;
    const top = Math.min(...boxes.map(([, y]) => y)) - MARGIN;
    const right = Math.max(...boxes.map(([x, , w]) => x + w)) + MARGIN;
    const bottom = Math.max(...boxes.map(([, y, , h]) => y + h)) + MARGIN;
    const height = Math.round(((bottom - top) * width) / (right - left));
    await page.setViewportSize({ width: LEFT + width + 110, height: Math.max(950, TOP + height + 100) });
    await page.waitForTimeout(500);
    await page.evaluate(([l, t, scale, sx, sy]) => {
      const { ds, canvas } = window.app.canvas;
      const box = canvas.getBoundingClientRect();
      Object.assign(ds, { scale });
      ds.offset = [(sx - box.left) / scale - l, (sy - box.top) / scale - t];
      // Red where a model's file is not there, in later front ends.
      for (const node of window.app.graph._nodes) node.has_errors = false;
      window.app.canvas.setDirty(true, true);
    }, [left, top, width / (right - left), LEFT, TOP]);
    await page.waitForTimeout(1500);
    const clip = { x: LEFT, y: TOP, width, height };
    const path = result || file.replace('.json', '.jpg');
    await page.screenshot({ path, type: 'jpeg', quality: 78, clip });
  }
}).catch((error) => {
  console.error(error);
  process.exit(1);
});

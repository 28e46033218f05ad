// node graph_pictures.js PORT NAME …: pictures of graphs as they open, workflows/NAME.jpg, for those
// whose models are not there to draw one. Of a ComfyUI that runs on that port.
const fs = require('fs');
const path = require('path');
const { withPage } = require('./browser.js');

const [port, ...names] = process.argv.slice(2);
const FOLDER = path.join(__dirname, '..', '..', 'workflows');
const [LEFT, TOP, WIDTH, MARGIN] = [90, 150, 1100, 10]; // clear of the front end's own bars

withPage(`http://127.0.0.1:${port}`, async (page) => {
  for (const name of names) {
    const file = path.join(FOLDER, `${name}.json`);
    const data = JSON.parse(fs.readFileSync(file));
    await page.evaluate(([d, n]) => window.app.loadGraphData(d, true, true, n), [data, name]);
    await page.waitForTimeout(2000);
    const boxes = data.groups.map((group) => group.bounding);
    const left = Math.min(...boxes.map(([x]) => x)) - MARGIN;
    const top = Math.min(...boxes.map(([, y]) => y)) - MARGIN;
    const right = Math.max(...boxes.map(([x, , w]) => x + w)) + MARGIN;
    const bottom = Math.max(...boxes.map(([, y, , h]) => y + h)) + MARGIN;
    await page.evaluate(([l, t, scale, sx, sy]) => {
      const { ds, canvas } = window.app.canvas;
      const box = canvas.getBoundingClientRect();
      Object.assign(ds, { scale });
      ds.offset = [(sx - box.left) / scale - l, (sy - box.top) / scale - t];
      window.app.canvas.setDirty(true, true);
    }, [left, top, WIDTH / (right - left), LEFT, TOP]);
    await page.waitForTimeout(1500);
    const height = Math.round(((bottom - top) * WIDTH) / (right - left));
    const clip = { x: LEFT, y: TOP, width: WIDTH, height };
    await page.screenshot({ path: file.replace('.json', '.jpg'), type: 'jpeg', quality: 78, clip });
  }
}).catch((error) => {
  console.error(error);
  process.exit(1);
});

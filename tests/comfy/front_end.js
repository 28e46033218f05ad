// node front_end.js PORT GRAPH.json PICTURE.png [run] [prompt] [help NODE_TYPE]
// Opens a graph in ComfyUI's own front end in headless Chromium and prints, as JSON, what the user
// would see: node types that are missing, toasts, and the text of the help panel. With "run" it
// presses the Run button and waits for the server to be idle again; with "prompt" it also prints what
// the front end would send to the server.
const fs = require('fs');
const os = require('os');
const path = require('path');
const { chromium } = require('playwright-core');

const [port, graph, picture, ...wishes] = process.argv.slice(2);
const base = `http://127.0.0.1:${port}`;
const json = async (url) => (await fetch(base + url)).json();

async function open(page) {
  const settings = {
    'Comfy.TutorialCompleted': true,
    'Comfy.Workflow.ShowMissingNodesWarning': true,
    'Comfy.Minimap.Visible': false, // it would cover nodes on the picture
  };
  for (const [name, value] of Object.entries(settings)) {
    await fetch(`${base}/settings/${name}`, { method: 'POST', body: JSON.stringify(value) });
  }
  await page.route('**/*', (route) => {
    const url = new URL(route.request().url());
    const ours = url.hostname === '127.0.0.1' || ['data:', 'blob:'].includes(url.protocol);
    return ours ? route.continue() : route.abort();
  });
  await page.goto(base, { waitUntil: 'domcontentloaded', timeout: 180000 });
  await page.waitForFunction(() => window.app?.graph && window.app.canvas, null, { timeout: 240000 });
  await page.waitForTimeout(3000);
  await page.keyboard.press('Escape');
  const data = JSON.parse(fs.readFileSync(graph));
  const name = path.basename(graph, '.json');
  await page.evaluate(([d, n]) => window.app.loadGraphData(d, true, true, n), [data, name]);
  await page.waitForTimeout(2000);
}

async function run(page) {
  await page.click('[data-testid="queue-button"] button, .queue-button-group button');
  for (let second = 0, idle = 0; second < 400 && idle < 3; second++) {
    await page.waitForTimeout(1000);
    const { exec_info } = await json('/prompt');
    idle = exec_info.queue_remaining === 0 ? idle + 1 : 0;
  }
  await page.waitForTimeout(2000);
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

(async () => {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'front-end-'));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM || '/usr/bin/chromium',
    viewport: { width: 1700, height: 950 },
    args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking'],
  });
  try {
    const page = context.pages()[0] || (await context.newPage());
    const errors = [];
    page.on('pageerror', (error) => errors.push(String(error).slice(0, 300)));
    await open(page);
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
    const seen = await page.evaluate(() => ({
      missing: window.app.graph._nodes.filter((n) => n.has_errors).map((n) => n.type),
      nodes: window.app.graph._nodes.length,
      toasts: [...document.querySelectorAll('.p-toast-message')].map((e) => e.innerText),
      dialogs: [...document.querySelectorAll('.p-dialog')].map((e) => e.innerText.slice(0, 300)),
      text: document.body.innerText.slice(0, 6000),
    }));
    await page.screenshot({ path: picture });
    const prompt = wishes.includes('prompt')
      ? await page.evaluate(async () => (await window.app.graphToPrompt()).output)
      : null;
    console.log(JSON.stringify({ ...seen, errors, prompt }));
  } finally {
    await context.close();
    fs.rmSync(profile, { recursive: true, force: true });
  }
})().catch((error) => {
  console.error(error);
  process.exit(1);
});

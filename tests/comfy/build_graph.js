// node build_graph.js PORT PICTURES: a user's first graph, in ComfyUI's own front end. From an empty
// canvas: nodes by the search box, links by dragging, LoRAs from their lists; a run that is
// cancelled, another that is not, and one with another strength. Prints, as JSON, what was seen.
const path = require('path');
const { RUN, idle, withPage } = require('./browser.js');

const [port, pictures] = process.argv.slice(2);
const base = `http://127.0.0.1:${port}`;
const NODES = {
  base: ['CheckpointLoaderSimple', 0, 0],
  loras: ['IterisLoras', 0, 180],
  settings: ['IterisSettings', 440, 200],
  merge: ['IterisMerge', 820, 0],
  positive: ['CLIPTextEncode', 1220, 0],
  negative: ['CLIPTextEncode', 1220, 240],
  latent: ['EmptyLatentImage', 1220, 480],
  sampler: ['KSampler', 1660, 0],
  decode: ['VAEDecode', 1660, 340],
  save: ['IterisSaveLora', 820, 560],
  shown: ['PreviewImage', 1660, 480],
};
const LINKS = [
  ['base', 'MODEL', 'merge', 'model'], ['base', 'CLIP', 'merge', 'clip'],
  ['loras', 'concepts', 'merge', 'concepts'], ['settings', 'settings', 'merge', 'settings'],
  ['merge', 'MODEL', 'sampler', 'model'], ['merge', 'CLIP', 'positive', 'clip'],
  ['merge', 'CLIP', 'negative', 'clip'], ['merge', 'trigger_words', 'positive', 'text'],
  ['positive', 'CONDITIONING', 'sampler', 'positive'],
  ['negative', 'CONDITIONING', 'sampler', 'negative'],
  ['latent', 'LATENT', 'sampler', 'latent_image'], ['sampler', 'LATENT', 'decode', 'samples'],
  ['base', 'VAE', 'decode', 'vae'], ['merge', 'lora', 'save', 'lora'],
  ['decode', 'IMAGE', 'save', 'thumbnail'], ['decode', 'IMAGE', 'shown', 'images'],
];

withPage(base, async (page, errors) => {
  const ids = {};
  const history = async () => Object.values(await (await fetch(`${base}/history`)).json());

  // Where a point of the graph is on the page.
  const at = (x, y) =>
    page.evaluate(([gx, gy]) => {
      const { ds, canvas } = window.app.canvas;
      const box = canvas.getBoundingClientRect();
      return [box.left + (gx + ds.offset[0]) * ds.scale, box.top + (gy + ds.offset[1]) * ds.scale];
    }, [x, y]);
  const view = async (scale, x, y) => {
    await page.evaluate(([s, ox, oy]) => {
      Object.assign(window.app.canvas.ds, { scale: s });
      window.app.canvas.ds.offset = [ox, oy];
      window.app.canvas.setDirty(true, true);
    }, [scale, x, y]);
    await page.waitForTimeout(500);
  };
  const picture = (name) => page.screenshot({ path: path.join(pictures, `${name}.png`) });

  const add = async (name, [type, x, y]) => {
    const title = await page.evaluate((t) => window.LiteGraph.registered_node_types[t].title, type);
    const dialogs = ['.comfy-vue-node-search-container', '[role="dialog"]']; // of 1.35 and of 1.49
    const box = page.locator(dialogs.map((dialog) => `${dialog} input`).join(', ')).first();
    for (let attempt = 0; attempt < 5 && !(await box.isVisible()); attempt++) {
      await page.keyboard.press('Escape'); // what the front end greets with lies over the canvas
      await page.mouse.dblclick(...(await at(x + 10, y - 20)));
      await page.waitForTimeout(1500);
    }
    const follows = !(await page.locator(dialogs[0]).first().isVisible());
    await box.fill(title);
    await page.waitForTimeout(900);
    await page.keyboard.press('Enter');
    await page.waitForTimeout(500);
    // Since 1.49 a new node follows the mouse until a click.
    if (follows) await page.mouse.click(...(await at(x + 10, y - 20)));
    await page.waitForTimeout(300);
    ids[name] = await page.evaluate(([t, nx, ny]) => {
      const node = window.app.graph._nodes.at(-1);
      if (node.type !== t) throw new Error(`the search gave ${node.type} for ${t}`);
      node.pos = [nx, ny];
      return node.id;
    }, [type, x, y]);
  };

  const slot = (name, isInput, which) =>
    page.evaluate(([id, input, wanted]) => {
      const node = window.app.graph.getNodeById(id);
      const slots = input ? node.inputs : node.outputs;
      const index = slots.findIndex((s) => s.name === wanted);
      return [...node.getConnectionPos(input, index)];
    }, [ids[name], isInput, which]);
  const wire = async ([from, output, to, input]) => {
    await page.mouse.move(...(await at(...(await slot(from, false, output)))));
    await page.mouse.down();
    await page.mouse.move(...(await at(...(await slot(to, true, input)))), { steps: 6 });
    await page.mouse.up();
    await page.waitForTimeout(200);
  };

  const list = page.locator('.iteris-loras');
  const choose = async (file) => {
    await list.locator('.add').click();
    await page.locator('.litecontextmenu .litemenu-entry', { hasText: file }).first().click();
    await page.waitForTimeout(1200);
  };
  const set = (name, values) =>
    page.evaluate(([id, given]) => {
      const node = window.app.graph.getNodeById(id);
      for (const [key, value] of Object.entries(given)) {
        const widget = node.widgets.find((w) => w.name === key);
        widget.value = value;
        widget.callback?.(value);
      }
    }, [ids[name], values]);
  const click = async (what) => {
    await what.click();
    await page.waitForTimeout(800);
  };
  const undo = async () => {
    await page.evaluate(() => document.activeElement?.blur());
    await page.keyboard.press('Control+z');
    await page.waitForTimeout(2000);
  };
  // What the list shows, and what its node would send.
  const rows = async () => ({
    shown: await list.locator('> div, > label').evaluateAll((lines) =>
      lines.map((line) => [
        line.querySelector('.file')?.title.split('\n')[0] ?? line.textContent,
        line.querySelector('input[type=checkbox]')?.checked,
      ])),
    sent: await page.evaluate((id) => {
      const node = window.app.graph.getNodeById(id);
      const { widgets_values: saved } = node.serialize();
      return [0, 1, 2].map((row) => saved.slice(7 * row, 7 * row + 7));
    }, ids.loras),
  });
  const blocks = () =>
    page.evaluate((id) => window.app.graph.getNodeById(id).widgets.find((w) => w.name === 'blocks_1').value, ids.loras);
  const values = (name, widget) =>
    page.evaluate(([id, wanted]) => {
      const node = window.app.graph.getNodeById(id);
      return [...node.widgets.find((w) => w.name === wanted).options.values];
    }, [ids[name], widget]);
  const run = async () => {
    await page.click(RUN);
    await idle(page, base);
    await page.waitForTimeout(1500);
    return (await history()).at(-1).status.status_str;
  };

  await page.evaluate(() => window.app.graph.clear());
  await view(0.68, 160, 160);
  for (const [name, what] of Object.entries(NODES)) await add(name, what);
  for (const link of LINKS) await wire(link);
  const seen = { nodes: ids, links: await page.evaluate(() => window.app.graph.links.size) };

  await view(1, 180, 160);
  seen.empty = await rows();
  await choose('a.safetensors');
  await choose('b.safetensors');
  seen.chosen = await rows();
  await picture('chosen');
  const [first, second] = [list.locator('.row').nth(0), list.locator('.row').nth(1)];
  await click(first.locator('.fold'));
  await list.locator('.bars').waitFor();
  seen.unfolded = await rows();
  await click(first.locator('.fold'));
  seen.folded = await rows();
  await click(first.locator('.fold'));
  // Weights by block: a line from 1 at the first bar to 0 at the last, and 1 again by two clicks.
  const bars = list.locator('.bars');
  const { x, y, width, height } = await bars.boundingBox();
  const bar = (number) => x + (width * (number + 0.5)) / 17;
  await page.mouse.move(bar(0), y + height / 2);
  await page.mouse.down();
  await page.mouse.move(bar(16), y + height - 0.5, { steps: 3 });
  await page.mouse.up();
  await page.waitForTimeout(800);
  await page.mouse.move(bar(8), y + height / 3);
  seen.bars = { drawn: await blocks(), named: await bars.locator('.hovered').textContent() };
  await page.mouse.dblclick(bar(16), y + height - 4);
  await page.waitForTimeout(800);
  seen.bars.reset = await blocks();
  await picture('bars');
  // Two clicks are one step or several, by how soon the second follows.
  for (let step = 0; step < 8 && (await blocks()); step++) await undo();
  seen.bars.undone = await blocks();
  seen.bars.rows = await rows();
  await click(first.locator('.fold'));
  await second.hover();
  await click(second.locator('.up'));
  seen.moved = await rows();
  await undo();
  seen.undone = await rows();
  await first.hover();
  await click(first.locator('.remove'));
  seen.removed = await rows();
  await undo();
  await click(list.locator('.all'));
  seen.off = await rows();
  await click(list.locator('.all'));
  seen.on = await rows();

  // What a file says of itself, and one that is chosen through its folder.
  await first.locator('.file').hover();
  await page.waitForTimeout(1000);
  seen.about = await first.locator('.file').getAttribute('title');
  await list.locator('.add').click();
  await page.locator('.litecontextmenu .litemenu-entry.has_submenu', { hasText: 'people/' }).first().click();
  await page.locator('.litecontextmenu').last().locator('.litemenu-entry', { hasText: 'c.safetensors' }).first().click();
  await page.waitForTimeout(1200);
  seen.folder = (await rows()).sent[2];
  await undo();
  for (let step = 0; step < 4 && (await rows()).sent[2][0] !== 'none'; step++) await undo();

  // A stand-in for rgthree's node, whose menu has an entry of ours.
  seen.converted = await page.evaluate(async () => {
    const { app, LiteGraph } = window;
    class PowerLoraLoader extends LiteGraph.LGraphNode {
      constructor() {
        super('Power Lora Loader');
        this.serialize_widgets = true;
        this.widgets = [
          { name: 'header', type: 'custom', value: {} },
          { name: 'lora_1', type: 'custom', value: { on: true, lora: 'a.safetensors', strength: 0.5, strengthTwo: null } },
          { name: 'lora_2', type: 'custom', value: { on: false, lora: 'b.safetensors', strength: 1, strengthTwo: 0 } },
        ];
      }
    }
    LiteGraph.registerNodeType('Power Lora Loader (rgthree)', PowerLoraLoader);
    const theirs = LiteGraph.createNode('Power Lora Loader (rgthree)');
    app.graph.add(theirs);
    const entry = app.canvas.getNodeMenuOptions(theirs).find((one) => one?.content === 'To IterIS LoRAs');
    entry.callback();
    await new Promise((done) => { setTimeout(done, 1500); });
    const ours = app.graph._nodes.at(-1);
    const saved = ours.serialize().widgets_values;
    app.graph.remove(ours);
    app.graph.remove(theirs);
    return [saved.slice(0, 7), saved.slice(7, 14), saved[14]];
  });

  // ComfyUI's own lists of LoRAs: the version's node, or a stand-in where it has none.
  seen.core = await page.evaluate(async () => {
    const { app, LiteGraph } = window;
    const found = {};
    for (const type of ['LoadLoraModel', 'LoadLoraTextEncoder']) {
      if (!LiteGraph.registered_node_types[type]) {
        LiteGraph.registerNodeType(type, class extends LiteGraph.LGraphNode {});
      }
      const theirs = LiteGraph.createNode(type);
      theirs.widgets = [['lora_name', 'b.safetensors'], ['strength', 0.25]].map(([name, value]) => (
        { name: `loras.0.${name}`, type: 'custom', value }
      ));
      app.graph.add(theirs);
      app.canvas.getNodeMenuOptions(theirs).find((one) => one?.content === 'To IterIS LoRAs').callback();
      await new Promise((done) => { setTimeout(done, 1500); });
      const ours = app.graph._nodes.at(-1);
      found[type] = ours.serialize().widgets_values.slice(0, 8);
      app.graph.remove(ours);
      app.graph.remove(theirs);
    }
    return found;
  });

  // A chain of Load LoRA before a merge: on the list, bypassed, and the merge takes the list.
  seen.chain = await page.evaluate(async () => {
    const { app, LiteGraph } = window;
    const kinds = ['CheckpointLoaderSimple', 'LoraLoader', 'LoraLoaderModelOnly', 'IterisMerge'];
    const nodes = kinds.map((kind) => {
      const node = LiteGraph.createNode(kind);
      app.graph.add(node);
      return node;
    });
    nodes.slice(1).forEach((node, index) => nodes[index].connect(0, node, node.inputs.findIndex((i) => i.name === 'model')));
    const fill = (node, values) => {
      for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
    };
    fill(nodes[1], { lora_name: 'a.safetensors', strength_model: 0.5, strength_clip: 0.25 });
    fill(nodes[2], { lora_name: 'b.safetensors', strength_model: 0.75 });
    app.canvas.getNodeMenuOptions(nodes[2]).find((one) => one?.content === 'To IterIS LoRAs').callback();
    await new Promise((done) => { setTimeout(done, 1500); });
    const made = app.graph._nodes.at(-1);
    const merge = nodes[3];
    const found = {
      rows: made.serialize().widgets_values.slice(0, 14),
      modes: nodes.map((node) => node.mode),
      taken: merge.getInputNode(merge.inputs.findIndex((i) => i.name === 'concepts')) === made,
    };
    for (const node of [...nodes, made]) app.graph.remove(node);
    return found;
  });

  await set('settings', { image_size: 64, timesteps: 2 });
  await set('sampler', { steps: 2, seed: 1 });
  await set('latent', { width: 64, height: 64 });
  await set('negative', { text: '' });
  await set('merge', { samples: 60 });
  await set('save', { card: true });
  await page.click(RUN);
  for (let second = 0; second < 120; second++) {
    await page.waitForTimeout(1000);
    if ((await page.locator('body').innerText()).match(/Plan: .*denoiser|enoising/)) break;
  }
  await picture('running');
  await page.locator('button:has(.icon-\\[lucide--x\\]), button[aria-label*="Cancel"], button[aria-label*="nterrupt"]').first().click({ timeout: 5000 }).catch(() => fetch(`${base}/interrupt`, { method: 'POST' }));
  await idle(page, base);
  seen.cancelled = (await history()).at(-1).status.messages.map(([kind]) => kind);
  await page.evaluate(() => document.querySelectorAll('.p-dialog-close-button, .p-toast-close-button').forEach((b) => b.click()));
  await set('merge', { samples: 3 });
  seen.run = await run();
  await picture('done');
  await set('merge', { strength: 0.5 });
  seen.again = await run();

  // The merge beside each LoRA alone, in one press on it.
  seen.compared = await page.evaluate(() => {
    const { app } = window;
    const merge = app.graph._nodes.find(({ type }) => type === 'IterisMerge');
    const before = new Set(app.graph._nodes);
    app.canvas.getNodeMenuOptions(merge).find((one) => one?.content === 'Compare with each LoRA alone').callback();
    const made = app.graph._nodes.filter((node) => !before.has(node));
    const [compare] = made;
    window.iterisMade = made;
    return {
      types: made.map(({ type }) => type),
      open: made.flatMap(({ type, inputs }) => inputs.filter((input) => input.link == null && !input.widget).map(({ name }) => `${type} ${name}`)),
      asked: made.filter(({ type }) => type === 'CLIPTextEncode').map((node) => node.getInputNode(node.inputs.findIndex(({ name }) => name === 'text'))?.type),
      values: Object.fromEntries(compare.widgets.map(({ name, value }) => [name, value])),
    };
  });
  await page.evaluate(() => {
    window.iterisMade[0].widgets.find(({ name }) => name === 'strengths').value = '0.5, 1';
  });
  seen.rows = [await run(), JSON.stringify((await history()).at(-1).outputs)];
  await view(0.6, 160, -420);
  await picture('compared');
  await page.evaluate(() => { for (const node of window.iterisMade) window.app.graph.remove(node); });

  await view(0.68, 160, 160);
  await add('load', ['LoraLoader', 360, 0]);
  seen.listed = await values('load', 'lora_name');
  seen.text = await page.locator('body').innerText();
  await view(1, 180, 160);
  await picture('left');
  await view(1, -560, 160);
  await picture('right');
  console.log(JSON.stringify({ ...seen, errors }));
}).catch((error) => {
  console.error(error);
  process.exit(1);
});

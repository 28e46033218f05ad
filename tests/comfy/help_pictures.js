// node help_pictures.js PORT [NODE …]: the pictures of the help pages, web/docs/NODE/{en,zh}.jpg, of
// nodes as they are in use, on a ComfyUI that runs there. What a node says is what it said on the
// toybox (workflows/quick_start_toybox.json and the others). The LoRAs of IterisLoras must be in the
// models folder, and the system needs a font with Chinese.
const fs = require('fs');
const path = require('path');
const { withPage } = require('./browser.js');

const [port, ...wanted] = process.argv.slice(2);
const base = `http://127.0.0.1:${port}`;
const DOCS = path.join(__dirname, '..', '..', 'web', 'docs');
const MARGIN = 18;
const MERGED = `Merged 2 concepts with iteris: 68 sites and 10 that repair drift, rank 16, 13.7 s, 480 rows.
  Kept on held-out rows (1: each LoRA alone, 0: the base): 0.83 at strength 1, 0.84 at strength 0.75, \
0.82 at strength 1.25, 0.84 beside another LoRA, least of sks1.
  Trigger words: sks1 star, sks6 square`;
const NODES = {
  IterisLoras: {
    values: {
      lora_1: 'my_cat.safetensors', words_1: 'sks cat', lora_2: 'xl_style.safetensors',
      prompts_2: 'style', words_2: 'in watercolor style', lora_3: 'my_dog.safetensors', on_3: false,
      blocks_1: '1,0.3,0.4,0.5,0.7,0.9,1,1,1.1,1.2,1.2,1.1,1,0.8,0.6,0.4,0.3',
    },
    properties: { iteris_open: [1] },
    says: 'my_cat at 1: sks cat (from the file)\nxl_style at 1: in watercolor style, style',
  },
  IterisConcept: { values: { lora_name: 'my_cat.safetensors', trigger: 'sks', class_word: 'cat' } },
  IterisPreservePrompts: {},
  IterisMerge: { says: MERGED },
  IterisSettings: {},
  IterisMergeExperts: {},
  IterisCompareMerges: {
    says: `stacked: Merged 2 concepts with sum: 68 sites, rank 16, 0.0 s.\niteris: ${MERGED}`,
  },
  IterisSaveLora: { says: 'Saved iteris/merged.safetensors' },
  IterisResizeLora: {
    values: { rank: 4 },
    says: 'sks1: ranks 2 to 7 in 68 layers; 99.8% of what it adds to their outputs is kept.',
  },
  IterisExtractLora: {
    values: { rank: 4 },
    says: '68 layers at ranks 1 to 7; error 4.4% of what the fine-tune changes.',
  },
  IterisInspectLoras: {},
  IterisClipScorerLoader: {},
  IterisVisionScorer: {},
  IterisClipImageAlignment: { says: 'image alignment: 0.8051' },
  IterisClipTextAlignment: {
    values: { prompts: 'a red star on a white background' }, says: 'text alignment: 0.8182',
  },
  IterisScoreSheet: { values: { labels: 'base\niteris', prompts: 'a sks1 star' } },
  IterisToybox: {},
};

async function take(page, type, { values = {}, properties = {}, says }, file) {
  await page.evaluate(([t]) => {
    const { graph, canvas } = window.app;
    graph.clear();
    const node = window.LiteGraph.createNode(t);
    node.pos = [80, 120];
    graph.add(node);
    Object.assign(canvas.ds, { scale: 1 });
    canvas.ds.offset = [60, 40];
    node.setSize([Math.max(node.size[0], 340), node.computeSize()[1]]);
  }, [type]);
  for (let round = 0; round < 2; round++) { // words that are filled in come later
    await page.evaluate(([given, more]) => {
      const node = window.app.graph._nodes[0];
      Object.assign(node.properties, more);
      for (const [name, value] of Object.entries(given)) {
        const widget = node.widgets.find((w) => w.name === name);
        widget.value = value;
        widget.callback?.(value);
      }
      node.onConfigure?.({}); // the list of IterIS LoRAs is drawn anew
    }, [values, properties]);
    await page.waitForTimeout(1500);
  }
  if (says) {
    await page.evaluate(async (text) => {
      const { api } = await import('/scripts/api.js');
      const node = window.app.graph._nodes[0];
      api.dispatchCustomEvent('iteris.text', { node: String(node.id), text });
    }, says);
    await page.waitForTimeout(700);
  }
  const [x, y, width, height] = await page.evaluate(() => {
    const { graph, canvas } = window.app;
    const [node] = graph._nodes;
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize([...node.size])[1])]);
    canvas.setDirty(true, true);
    const box = canvas.canvas.getBoundingClientRect();
    return [box.left + node.pos[0] + 60, box.top + node.pos[1] + 40, ...node.size];
  });
  await page.waitForTimeout(500);
  const clip = {
    x: x - MARGIN, y: y - 30 - MARGIN, width: width + 2 * MARGIN, height: height + 30 + 2 * MARGIN,
  };
  fs.mkdirSync(path.dirname(file), { recursive: true });
  await page.screenshot({ path: file, type: 'jpeg', quality: 78, clip });
}

(async () => {
  for (const locale of ['en', 'zh']) {
    await fetch(`${base}/settings/Comfy.Locale`, { method: 'POST', body: JSON.stringify(locale) });
    await withPage(base, async (page) => {
      for (const [type, what] of Object.entries(NODES)) {
        if (wanted.length && !wanted.includes(type)) continue;
        await take(page, type, what, path.join(DOCS, type, `${locale}.jpg`));
      }
    });
  }
  await fetch(`${base}/settings/Comfy.Locale`, { method: 'POST', body: JSON.stringify('en') });
})().catch((error) => {
  console.error(error);
  process.exit(1);
});

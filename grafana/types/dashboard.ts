// A dashboard as Grafana's own types describe it, each kind of panel with its own options.
//
// The check is `const page: Page = {...the JSON...}`, which `tsc --noEmit` accepts or does not: a
// misspelt key is an excess property, a misspelt word not one of an enum's.

import type { AnnotationQuery, Dashboard, DataQuery, FieldConfig, Panel, RowPanel } from "@grafana/schema";
import type * as Heatmap from "@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type * as Stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as States from "@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen";
import type * as Series from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

// JSON has the words of an enum, not its members.
type Json<T> = T extends string
  ? `${T}`
  : T extends (infer Item)[]
    ? Json<Item>[]
    : T extends object
      ? { [Key in keyof T]: Json<T[Key]> }
      : T;

// What the schema leaves open: a query of the Prometheus data source, as its editor saves it.
interface Query extends DataQuery {
  datasource: { type: "prometheus"; uid: string };
  expr: string;
  editorMode: "code";
  format: "time_series" | "heatmap";
  legendFormat: string;
  range: true;
}

interface Annotation extends Omit<AnnotationQuery, "target"> {
  target: DataQuery & { editorMode: "code"; expr: string };
  titleFormat: string;
}

interface Kind<Type extends string, Options, Custom> extends Omit<
  Panel,
  "type" | "options" | "targets" | "fieldConfig"
> {
  id: number;
  title: string;
  description: string;
  type: Type;
  options: Options;
  targets: Query[];
  fieldConfig: {
    defaults: Omit<FieldConfig, "custom"> & { custom?: Custom };
    overrides: { matcher: { id: string; options: string }; properties: { id: string; value: object }[] }[];
  };
}

type Shown =
  | Kind<"heatmap", Partial<Heatmap.Options>, Heatmap.FieldConfig>
  | Kind<"stat", Stat.Options, never>
  | Kind<"state-timeline", States.Options, States.FieldConfig>
  | Kind<"timeseries", Series.Options, Series.FieldConfig>;

export type Page = Json<
  Omit<Dashboard, "annotations" | "panels"> & {
    annotations: { list: Annotation[] };
    panels: (Shown | RowPanel)[];
  }
>;

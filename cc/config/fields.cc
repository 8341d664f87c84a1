// Invariant: within a section the order of the fields is the order of reading. "sparse_files" comes before everything
// that has one element for each table, and an old spelling before the field it stands for.

#include "cc/config/fields.h"

#include <cstdint>
#include <utility>

namespace hps {
namespace {

Limits AtLeast(double minimum) { return {.minimum = minimum}; }
Limits Between(double minimum, double maximum) { return {.minimum = minimum, .maximum = maximum}; }
Limits Formatted(StringFormat format) { return {.format = format}; }

// A field that is one member of the section's struct.
template <typename S, typename T>
Field<S> Plain(std::string_view name, T S::*member, const Limits& limits, std::string_view description,
               FieldState state = FieldState::kEffective) {
  Field<S> field;
  field.name = name;
  field.type = TypeOf<T>();
  field.limits = limits;
  field.state = state;
  field.description = description;
  field.default_value = WriteValue(S().*member);
  field.read = [member, limits](const JsonValue& value, const Place& place, Notes*, S* out) {
    return ReadValue(value, place, limits, &(out->*member));
  };
  if (!limits.secret) field.write = [member](const S& config) { return WriteValue(config.*member); };
  return field;
}

template <typename S>
Field<S> Required(Field<S> field) {
  field.required = true;
  field.default_value = {};
  return field;
}

template <typename S>
Field<S> WithDefaultText(Field<S> field, std::string_view text) {
  field.default_value = {};
  field.default_text = text;
  return field;
}

// A key of the predecessor that is checked and then forgotten.
template <typename S, typename T>
Field<S> NoEffect(std::string_view name, T default_value, const Limits& limits, std::string_view description) {
  Field<S> field;
  field.name = name;
  field.type = TypeOf<T>();
  field.limits = limits;
  field.state = FieldState::kNoEffect;
  field.description = description;
  field.default_value = WriteValue(default_value);
  field.read = [limits](const JsonValue& value, const Place& place, Notes*, S*) {
    T ignored{};
    return ReadValue(value, place, limits, &ignored);
  };
  return field;
}

// A list with one element for each table, stored as a member of TableConfig.
template <typename T>
Field<ModelConfig> Column(std::string_view name, T TableConfig::*member, const Limits& limits,
                          std::string_view description) {
  Field<ModelConfig> field;
  field.name = name;
  field.type = TypeOf<T>();
  field.type.list = true;
  field.limits = limits;
  field.per_table = true;
  field.description = description;
  field.read = [member, limits, name](const JsonValue& value, const Place& place, Notes* notes, ModelConfig* model) {
    HPS_ASSIGN_OR_RETURN(const JsonArray* elements, ReadList(value, place, "a list with one element for each table"));
    size_t expected = model->tables.size();
    bool padded = std::is_same_v<T, float> && elements->size() < expected;  // the default values
    if (elements->size() != expected && !padded) {
      return place.Error("has " + std::to_string(elements->size()) + " elements, but \"sparse_files\" names " +
                         std::to_string(expected) + " tables; give one element for each table");
    }
    if (padded) {
      notes->warnings.push_back(place.origin + ": " + place.pointer + ": has " + std::to_string(elements->size()) +
                                " elements for " + std::to_string(expected) +
                                " tables; the missing ones are 0, write them out");
    }
    for (size_t i = 0; i < elements->size(); ++i) {
      HPS_RETURN_IF_ERROR(ReadValue((*elements)[i], place.Child(i), limits, &(model->tables[i].*member)));
    }
    return OkStatus();
  };
  field.write = [member](const ModelConfig& model) {
    JsonArray elements;
    for (const TableConfig& table : model.tables) elements.push_back(WriteValue(table.*member));
    return JsonValue{std::move(elements)};
  };
  return field;
}

// "sparse_files": the column that says how many tables there are.
Field<ModelConfig> SparseFiles() {
  Field<ModelConfig> column =
      Column("sparse_files", &TableConfig::path, Formatted(StringFormat::kNotEmpty),
             "the folder of each table, with the files `key` (int64) and `emb_vector` (float32); a relative path is "
             "taken from the working directory, then from the folder of ps.json");
  column.read = [read = column.read](const JsonValue& value, const Place& place, Notes* notes, ModelConfig* model) {
    HPS_ASSIGN_OR_RETURN(const JsonArray* elements, ReadList(value, place, "a list with one folder for each table"));
    if (elements->empty()) return place.Error("names no table; a model has at least one");
    model->tables.assign(elements->size(), TableConfig());
    for (size_t i = 0; i < elements->size(); ++i) model->tables[i].name = "sparse_embedding" + std::to_string(i);
    return read(value, place, notes, model);
  };
  return Required(std::move(column));
}

// "use_static_table": true is the old way to ask for the static cache.
Field<ModelConfig> UseStaticTable() {
  Field<ModelConfig> field;
  field.name = "use_static_table";
  field.type = TypeOf<bool>();
  field.state = FieldState::kOldSpelling;
  field.description = "true is the old spelling of `\"embedding_cache_type\": \"static\"`";
  field.default_value = {false};
  field.read = [](const JsonValue& value, const Place& place, Notes*, ModelConfig* model) {
    bool is_static = false;
    HPS_RETURN_IF_ERROR(ReadValue(value, place, {}, &is_static));
    if (is_static) model->cache_type = CacheType::kStatic;
    return OkStatus();
  };
  return field;
}

// "max_batch_size" of a database: one number for reading and writing.
template <typename S>
Field<S> DatabaseBatchSize() {
  Field<S> field;
  field.name = "max_batch_size";
  field.type = TypeOf<uint32_t>();
  field.limits = AtLeast(1);
  field.state = FieldState::kOldSpelling;
  field.description = "sets `max_get_batch_size` and `max_set_batch_size` at once";
  field.default_text = "that of the two";
  field.read = [](const JsonValue& value, const Place& place, Notes*, S* config) {
    HPS_RETURN_IF_ERROR(ReadValue(value, place, AtLeast(1), &config->max_get_batch_size));
    config->max_set_batch_size = config->max_get_batch_size;
    return OkStatus();
  };
  return field;
}

// A nested object.
template <typename S>
Field<ServerConfig> Nested(std::string_view name, S ServerConfig::*member, const Section<S>& section,
                           std::string_view default_text) {
  Field<ServerConfig> field;
  field.name = name;
  field.type.kind = ValueType::Kind::kSection;
  field.description = section.info.description;
  field.default_text = default_text;
  field.section = &section.info;
  field.read = [member, &section](const JsonValue& value, const Place& place, Notes* notes, ServerConfig* config) {
    return ReadSection(section, value, place, notes, &(config->*member));
  };
  field.write = [member, &section](const ServerConfig& config) { return WriteSection(section, config.*member); };
  return field;
}

Field<ServerConfig> Models() {
  Field<ServerConfig> field;
  field.name = "models";
  field.type = {ValueType::Kind::kSection, true, {}};
  field.required = true;
  field.description = "the models, at least one";
  field.section = &ModelSection().info;
  field.read = [](const JsonValue& value, const Place& place, Notes* notes, ServerConfig* config) {
    HPS_ASSIGN_OR_RETURN(const JsonArray* elements, ReadList(value, place, "a list of models"));
    if (elements->empty()) return place.Error("is empty; a server needs at least one model");
    config->models.assign(elements->size(), ModelConfig());
    for (size_t i = 0; i < elements->size(); ++i) {
      HPS_RETURN_IF_ERROR(ReadSection(ModelSection(), (*elements)[i], place.Child(i), notes, &config->models[i]));
    }
    return OkStatus();
  };
  field.write = [](const ServerConfig& config) {
    JsonArray models;
    for (const ModelConfig& model : config.models) models.push_back(WriteSection(ModelSection(), model));
    return JsonValue{std::move(models)};
  };
  return field;
}

// "$schema": for editors, which find docs/ps.schema.json by it.
Field<ServerConfig> EditorSchema() {
  Field<ServerConfig> field;
  field.name = "$schema";
  field.type = TypeOf<std::string>();
  field.description = "the address of this file's JSON schema, docs/ps.schema.json, for editors";
  field.default_text = "none";
  field.read = [](const JsonValue& value, const Place& place, Notes*, ServerConfig*) {
    std::string ignored;
    return ReadValue(value, place, {}, &ignored);
  };
  return field;
}

// Built in place and never destroyed: the address of `info` is handed out, and threads may outlive main.
template <typename S>
const Section<S>* MakeSection(std::string_view pointer, std::string_view description, std::vector<Field<S>> fields,
                              decltype(Section<S>::finish) finish) {
  auto* section = new Section<S>{{pointer, description, {}}, std::move(fields), std::move(finish)};
  for (const Field<S>& field : section->fields) section->info.fields.push_back(&field);
  return section;
}

constexpr auto kLater = FieldState::kLater;
constexpr auto kNotEmpty = StringFormat::kNotEmpty;

}  // namespace

const Section<ModelConfig>& ModelSection() {
  using M = ModelConfig;
  static const auto* section = MakeSection<M>(
      "/models/*", "one model: its tables and how they are cached",
      {
          Required(Plain("model", &M::name, Formatted(StringFormat::kName), "the name that lookups use")),
          SparseFiles(),
          Required(Column("embedding_vecsize_per_table", &TableConfig::width, AtLeast(1),
                          "the number of float32 values in a row of each table")),
          Required(Column("maxnum_catfeature_query_per_table_per_sample", &TableConfig::max_keys_per_sample, AtLeast(1),
                          "how many keys of each table a sample asks for; sizes buffers, is no limit")),
          WithDefaultText(Column("default_value_for_each_table", &TableConfig::default_value, {},
                                 "every element of the row that an unknown key gets; a list that is too short is "
                                 "padded with 0, with a warning"),
                          "0.0 for each"),
          WithDefaultText(Column("embedding_table_names", &TableConfig::name, Formatted(StringFormat::kName),
                                 "the names of the tables, unique within the model"),
                          "sparse_embedding0, sparse_embedding1, ..."),
          WithDefaultText(Plain("deployed_device_list", &M::deployed_devices, AtLeast(0),
                                "ordinals of the GPUs that hold a cache; an empty list means none, the CPU serves"),
                          "[0]"),
          Plain("max_batch_size", &M::max_batch_size, AtLeast(1), "samples in a batch; sizes buffers, is no limit"),
          Plain("share_tables", &M::share_tables, {},
                "tables of models that all set this and name the same folder are one: one copy of the rows in each "
                "tier, one cache on each GPU, and updates through one model reach all"),
          Plain("gpucache", &M::gpucache, {}, "keep hot rows on the GPU; without a GPU the CPU serves"),
          Plain("gpucacheper", &M::gpucacheper, Between(0, 1),
                "the part of each table that the GPU cache holds; above 0 where `gpucache` is true"),
          WithDefaultText(
              Plain("hit_rate_threshold", &M::hit_rate_threshold, AtLeast(0),
                    "from this cache hit rate on, missing keys get the default value at once and are "
                    "fetched in the background; below it, and always if above 1, the lookup waits for them"),
              "exact: every lookup waits"),
          UseStaticTable(),
          Plain("embedding_cache_type", &M::cache_type, {},
                "the rows that are read most, replaced as needed; the whole table on the GPU; or the whole table with "
                "the part `gpucacheper` of it on the GPU, in steps of a seventh, and the rest in pinned host memory"),
          Plain("init_ec", &M::init_ec, {}, "fill the cache at start"),
          Plain("enable_pagelock", &M::enable_pagelock, {},
                "the rows of static caches lie in pinned host memory, once for each GPU, and their index on the GPU; "
                "needs `embedding_cache_type` `\"static\"`"),
          Plain("fp8_quant", &M::fp8_quant, {},
                "caches that hold whole tables keep rows as 8-bit integers with a scale for each row; needs "
                "`embedding_cache_type` `\"static\"` or `\"uvm\"`"),
          Plain("cache_refresh_percentage_per_iteration", &M::cache_refresh_percentage_per_iteration, Between(0, 1),
                "the part of the cache that one step of a refresh renews"),
          Plain("refresh_delay", &M::refresh_delay_seconds, AtLeast(0), "seconds until the first refresh"),
          Plain("refresh_interval", &M::refresh_interval_seconds, AtLeast(0),
                "seconds between refreshes; 0 means no repetition"),
          Plain("num_of_worker_buffer_in_pool", &M::worker_buffers, AtLeast(1),
                "lookups side by side on one GPU for which memory is reserved at start; more take it as they come"),
          NoEffect<M>("use_context_stream", true, {}, "lookups always work on the framework's GPU stream"),
          NoEffect<M>("num_of_refresher_buffer_in_pool", uint32_t{1}, AtLeast(0), "caches are refreshed one by one"),
          NoEffect<M>("thread_pool_size", uint32_t{16}, AtLeast(1), "missing keys are fetched by all processors"),
          NoEffect<M>("fuse_embedding_table", true, {}, "the tables of a call are looked up by one launch in any case"),
          NoEffect<M>("use_hctr_cache_implementation", true, {}, "there is one implementation of the cache"),
          NoEffect<M>("device_id", int32_t{0}, AtLeast(0), "superseded by `deployed_device_list`"),
          NoEffect<M>("freeze_sparse", false, {}, "an option of a Triton backend"),
          NoEffect<M>("dense_file", std::string(), {}, "weights of the dense network; no part of a lookup"),
          NoEffect<M>("network_file", std::string(), {}, "the dense network; no part of a lookup"),
          NoEffect<M>("maxnum_des_feature_per_sample", uint32_t{26}, {}, "inputs of the dense network"),
          NoEffect<M>("label_dim", uint32_t{1}, {}, "outputs of the dense network"),
          NoEffect<M>("slot_num", uint32_t{10}, {}, "inputs of the dense network"),
          NoEffect<M>("use_mixed_precision", false, {}, "an option of the dense network"),
          NoEffect<M>("scaler", 1.0, {}, "an option of the dense network"),
          NoEffect<M>("use_algorithm_search", true, {}, "an option of the dense network"),
          NoEffect<M>("use_cuda_graph", true, {}, "an option of the dense network"),
      },
      FinishModel);
  return *section;
}

const Section<VolatileConfig>& VolatileSection() {
  using V = VolatileConfig;
  static const auto* section = MakeSection<V>(
      "/volatile_db", "the volatile tier: rows in memory",
      {
          Plain("type", &V::type, {}, "`hash_map` and `parallel_hash_map` select the same store"),
          WithDefaultText(Plain("num_partitions", &V::num_partitions, Between(1, 65536),
                                "parts of a table; at most 4096 for hash_map and multi_process_hash_map"),
                          "hash_map: the number of cores, at most 16; multi_process_hash_map: 16; redis_cluster: 8"),
          DatabaseBatchSize<V>(),
          Plain(
              "max_get_batch_size", &V::max_get_batch_size, AtLeast(1),
              "keys in one request to read; hash_map: keys between two looks at the time limit, after which old rows' "
              "memory is free again; multi_process_hash_map: no effect"),
          Plain("max_set_batch_size", &V::max_set_batch_size, AtLeast(1),
                "rows in one request to write; hash_map: rows that a partition writes before others get their turn; "
                "multi_process_hash_map: no effect"),
          Plain("allocation_rate", &V::allocation_rate_bytes, AtLeast(1),
                "bytes that a hash map asks of the system at a time"),
          Plain("shared_memory_size", &V::shared_memory_bytes, AtLeast(1),
                "multi_process_hash_map: most bytes of shared memory; taken as they are needed"),
          Plain("shared_memory_name", &V::shared_memory_name, Formatted(kNotEmpty),
                "multi_process_hash_map: name of the shared memory, a file in /dev/shm"),
          Plain("shared_memory_auto_remove", &V::shared_memory_auto_remove, {},
                "multi_process_hash_map: the last process removes the shared memory"),
          Plain("address", &V::address, Formatted(StringFormat::kHosts),
                "redis_cluster: host[:port] of one or more nodes, separated by commas; without a port: 7000"),
          Plain("user_name", &V::user_name, {}, "redis_cluster: user"),
          Plain("password", &V::password, {.secret = true}, "redis_cluster: password; never shown or exported"),
          Plain("password_env", &V::password_env, {},
                "redis_cluster: the environment variable that holds the password"),
          Plain("password_file", &V::password_file, {}, "redis_cluster: the file whose first line is the password"),
          Plain("num_node_connections", &V::num_node_connections, AtLeast(1), "redis_cluster: connections to a node"),
          Plain("enable_tls", &V::enable_tls, {}, "redis_cluster: encrypt the connections"),
          Plain("tls_ca_certificate", &V::tls_ca_certificate, Formatted(kNotEmpty),
                "redis_cluster: file or folder of trusted certificates"),
          Plain("tls_client_certificate", &V::tls_client_certificate, Formatted(kNotEmpty),
                "redis_cluster: certificate of this client"),
          Plain("tls_client_key", &V::tls_client_key, Formatted(kNotEmpty), "redis_cluster: key of this client"),
          Plain("tls_server_name_identification", &V::tls_server_name_identification, Formatted(kNotEmpty),
                "redis_cluster: the server name that is asked for and checked"),
          WithDefaultText(Plain("overflow_margin", &V::overflow_margin, AtLeast(1),
                                "most rows in one partition; a further one makes rows leave by `overflow_policy`"),
                          "18446744073709551615: unlimited"),
          Plain("overflow_policy", &V::overflow_policy, {},
                "which rows leave a partition that is full: those written (or read, see `refresh_time_after_fetch`) "
                "longest ago, any, or those written and read least often"),
          Plain("overflow_resolution_target", &V::overflow_resolution_target,
                {.minimum = 0, .maximum = 1, .above_minimum = true, .below_maximum = true},
                "the part of `overflow_margin` that stays after an eviction"),
          Plain("initial_cache_rate", &V::initial_cache_rate, Between(0, 1),
                "the part of each table that is put here at start, as far as `overflow_margin` allows; below 1 only "
                "with a "
                "persistent tier"),
          Plain("refresh_time_after_fetch", &V::refresh_time_after_fetch, {},
                "`evict_oldest`: reading a row makes it young, not only writing it"),
          Plain("cache_missed_embeddings", &V::cache_missed_embeddings, {},
                "rows found in the persistent tier are copied here"),
          Plain("initialize_after_startup", &V::initialize_after_startup, {},
                "false: the tier serves what it holds, and no tables are loaded into it"),
          Plain("timeout_ms", &V::timeout_ms, {}, "longest wait of one lookup for this tier; 0: no limit of its own"),
          WithDefaultText(Plain("when_unavailable", &V::when_unavailable, {},
                                "what a lookup does while this tier is down or too slow: fail, ask the next tier, or "
                                "take the default value"),
                          "\"next_tier\"; without persistent_db: \"fail\""),
          Plain("update_filters", &V::update_filters, Formatted(StringFormat::kRegularExpression),
                "regular expressions; updates of models whose name matches one come here", kLater),
          NoEffect<V>("algorithm", HashMapAlgorithm::kPhm, {}, "there is one implementation of the hash map"),
      },
      FinishVolatile);
  return *section;
}

const Section<PersistentConfig>& PersistentSection() {
  using P = PersistentConfig;
  static const auto* section = MakeSection<P>(
      "/persistent_db", "the persistent tier: all rows on disk",
      {
          WithDefaultText(Plain("type", &P::type, {}, "the kind of database"),
                          "\"rocks_db\"; without the section: \"disabled\""),
          WithDefaultText(Plain("path", &P::path, Formatted(kNotEmpty), "the folder of the database"),
                          "rocksdb in the folder for temporary files"),
          Plain("num_threads", &P::num_threads, AtLeast(1), "most threads of the database, and of one read"),
          Plain("read_only", &P::read_only, {}, "open without writing; nothing is loaded into it"),
          DatabaseBatchSize<P>(),
          Plain("max_get_batch_size", &P::max_get_batch_size, AtLeast(1), "keys in one request to read"),
          Plain("max_set_batch_size", &P::max_set_batch_size, AtLeast(1), "rows in one request to write"),
          Plain("initialize_after_startup", &P::initialize_after_startup, {},
                "false: the tier serves what it holds, and no tables are loaded into it"),
          Plain("timeout_ms", &P::timeout_ms, {}, "longest wait of one lookup for this tier; 0: no limit of its own"),
          Plain("when_unavailable", &P::when_unavailable, {},
                "what a lookup does while this tier is down or too slow: fail, or take the default value"),
          Plain("update_filters", &P::update_filters, Formatted(StringFormat::kRegularExpression),
                "regular expressions; updates of models whose name matches one come here", kLater),
      },
      FinishPersistent);
  return *section;
}

const Section<UpdateSourceConfig>& UpdateSourceSection() {
  using U = UpdateSourceConfig;
  static const auto* section = MakeSection<U>(
      "/update_source", "where updates of rows come from",
      {
          WithDefaultText(Plain("type", &U::type, {}, "the kind of source", kLater),
                          "\"kafka_message_queue\"; without the section: \"null\""),
          Plain("brokers", &U::brokers, Formatted(StringFormat::kHosts),
                "host[:port] of one or more brokers, separated by commas or semicolons", kLater),
          Plain("poll_timeout_ms", &U::poll_timeout_ms, AtLeast(1), "longest wait for more updates", kLater),
          Plain("max_receive_buffer_size", &U::max_receive_buffer_size, AtLeast(1),
                "received updates that are passed on without waiting further", kLater),
          Plain("max_batch_size", &U::max_batch_size, AtLeast(1), "most updates passed on at once", kLater),
          Plain("failure_backoff_ms", &U::failure_backoff_ms, {}, "wait before a failed update is tried again", kLater),
          Plain("metadata_refresh_interval_ms", &U::metadata_refresh_interval_ms, AtLeast(10),
                "how often new topics are looked for", kLater),
          Plain("receive_buffer_size", &U::receive_buffer_size, AtLeast(1024), "bytes of one receive buffer", kLater),
          Plain("max_commit_interval", &U::max_commit_interval, {}, "most messages between two commits", kLater),
      },
      FinishUpdateSource);
  return *section;
}

const Section<ServerConfig>& ServerSection() {
  using C = ServerConfig;
  static const auto* section =
      MakeSection<C>("", "the document",
                     {
                         EditorSchema(),
                         Required(Plain("supportlonglong", &C::long_keys, {},
                                        "true: 64-bit keys; false: keys that fit in 32 bits (ids may be int32)")),
                         NoEffect<C>("fuse_embedding_table", false, {},
                                     "the tables of a call are looked up by one launch in any case"),
                         Plain("lookup_timeout_ms", &C::lookup_timeout_ms, {},
                               "longest time of a lookup that brings no deadline of its own; 0: no limit"),
                         Models(),
                         Nested("volatile_db", &C::volatile_db, VolatileSection(), "a hash map"),
                         Nested("persistent_db", &C::persistent_db, PersistentSection(), "none"),
                         Nested("update_source", &C::update_source, UpdateSourceSection(), "none"),
                     },
                     FinishServer);
  return *section;
}

std::vector<const SectionInfo*> AllSections() {
  return {&ServerSection().info, &ModelSection().info, &VolatileSection().info, &PersistentSection().info,
          &UpdateSourceSection().info};
}

}  // namespace hps

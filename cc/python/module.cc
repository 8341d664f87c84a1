// _hps: the core for Python. hierarchical_parameter_server/_native.py is the only importer.
//
// Every call that may wait releases the interpreter lock. A Status becomes the exception of the same name in
// hierarchical_parameter_server/errors.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <future>
#include <limits>
#include <mutex>
#include <string>
#include <system_error>
#include <variant>
#include <vector>

#include "cc/base/fork_guard.h"
#include "cc/base/system_limits.h"
#include "cc/cache/cache_plan.h"
#include "cc/cache/cache_writer.h"
#include "cc/cache/device_cache.h"
#include "cc/core/host_memory.h"
#include "cc/storage/shared_inspection.h"
#include "cc/storage/table_memory.h"
#include "hps/config.h"
#include "hps/log.h"
#include "hps/model_reader.h"
#include "hps/parameter_server.h"
#include "hps/server_registry.h"

namespace py = pybind11;

namespace {

void Check(const hps::Status& status) {
  if (status.ok()) return;
  const std::string name = std::string(hps::StatusCodeName(status.code())) + "Error";
  py::object type = py::module_::import("hierarchical_parameter_server.errors").attr(name.c_str());
  PyErr_SetString(type.ptr(), status.message().c_str());
  throw py::error_already_set();
}

template <typename T>
T Unwrap(hps::Result<T> result) {
  Check(result.status());
  return std::move(result).value();
}

hps::OverflowOptions Overflow(uint64_t margin, const std::string& policy) {
  hps::OverflowOptions overflow{.margin = margin};
  if (policy == "evict_random") overflow.policy = hps::OverflowPolicy::kEvictRandom;
  if (policy == "evict_least_used") overflow.policy = hps::OverflowPolicy::kEvictLeastUsed;
  return overflow;
}

// Calls that run without the interpreter lock. A thread that asks for the lock after the interpreter has gone never
// gets it, and takes the process down from inside our frames; so at exit no more calls let go of it, and those that
// have are waited for.
class UnlockedCalls {
 public:
  // Counts a call while it lives.
  class Scope {
   public:
    explicit Scope(UnlockedCalls& calls) : calls_(calls) {
      std::lock_guard lock(calls_.mutex_);
      ++calls_.running_;
    }
    ~Scope() {
      std::lock_guard lock(calls_.mutex_);
      if (--calls_.running_ == 0) calls_.none_running_.notify_all();
    }

   private:
    UnlockedCalls& calls_;
  };

  bool allowed() const { return allowed_; }
  void EndAll() {
    allowed_ = false;
    py::gil_scoped_release release;
    const hps::Status closed = hps::ParameterServer::CloseAll();
    if (!closed.ok()) hps::Log(hps::LogLevel::kWarning, "at exit: " + closed.ToString());
    std::unique_lock lock(mutex_);
    none_running_.wait_for(lock, std::chrono::seconds(10), [this] { return running_ == 0; });
  }

 private:
  std::atomic<bool> allowed_{true};
  std::mutex mutex_;
  std::condition_variable none_running_;
  int running_ = 0;  // guarded by mutex_
};

// A forked child has one of its own: the threads that its parent counts are not there.
UnlockedCalls& Calls() { return hps::ProcessInstance<UnlockedCalls>(); }

// Runs `body` without the interpreter lock.
template <typename Body>
auto Unlocked(Body body) {
  if (!Calls().allowed()) return body();
  UnlockedCalls::Scope scope(Calls());  // outlives `release`: until the lock is held again
  py::gil_scoped_release release;
  return body();
}

// Runs `body(cancelled)`, which may take long, on a thread of its own, so that an interrupt (Ctrl-C) is seen at once:
// it then becomes *cancelled, and the exception that Python makes of it once the body has ended.
template <typename Body>
auto Interruptible(Body body) {
  std::atomic<bool> cancelled{false};
  if (!Calls().allowed()) return body(&cancelled);
  std::future<decltype(body(&cancelled))> done;
  try {
    done = std::async(std::launch::async, [&] { return body(&cancelled); });
  } catch (const std::system_error&) {
    Check(hps::NoThreads("the call needs a thread"));
  }
  const auto ended = [&](std::chrono::milliseconds wait) {
    return Unlocked([&] { return done.wait_for(wait) == std::future_status::ready; });
  };
  while (!ended(std::chrono::milliseconds(100))) {
    if (PyErr_CheckSignals() == 0) continue;
    py::error_already_set interrupt;
    cancelled = true;
    while (!ended(std::chrono::hours(1))) {
    }
    throw interrupt;
  }
  return done.get();
}

// Python looks up on the host: caches on devices would take memory for nobody.
hps::ServerOptions OnHost(const std::atomic<bool>* cancelled) {
  return {.cancelled = cancelled, .device_caches = false};
}

// An element of "models" as LoadModel wants it.
hps::ModelConfig ParseModel(const std::string& json) {
  std::vector<std::string> warnings;
  hps::ModelConfig model = Unwrap(hps::ParseModelConfig(json, "configuration of the model", &warnings));
  for (const std::string& warning : warnings) hps::Log(hps::LogLevel::kWarning, warning);
  Check(hps::MakePathsAbsolute("", &model));
  return model;
}

using TableName = std::variant<int64_t, std::string>;

uint32_t FindTable(const hps::LookupSession& session, const TableName& table) {
  if (const auto* name = std::get_if<std::string>(&table)) return Unwrap(session.FindTable(*name));
  const int64_t id = std::get<int64_t>(table);
  const size_t tables = Unwrap(session.Tables()).size();
  if (id < 0 || static_cast<size_t>(id) >= tables) {
    Check(hps::InvalidArgument("table " + std::to_string(id) + " does not exist; the model has " +
                               std::to_string(tables) + " tables, numbered from 0"));
  }
  return static_cast<uint32_t>(id);
}

// Keys as a contiguous int64 array; other integer types are widened, floats and unsigned 64-bit refused.
py::array_t<int64_t, py::array::c_style> KeysOf(const py::array& keys) {
  const char kind = keys.dtype().kind();
  const bool fits = kind == 'i' || (kind == 'u' && keys.dtype().itemsize() < 8);
  if (!fits) {
    Check(hps::InvalidArgument("keys must be integers of at most 64 bits, signed, but are " +
                               std::string(py::str(keys.dtype()))));
  }
  return py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(keys);
}

py::dict ReportDict(const hps::LookupReport& report) {
  py::dict dict;
  dict["keys"] = report.keys;
  dict["rows_from_volatile"] = report.rows_from_volatile;
  dict["rows_from_persistent"] = report.rows_from_persistent;
  dict["rows_from_default"] = report.rows_from_default;
  dict["rows_unavailable"] = report.rows_unavailable;
  dict["rows_skipped_volatile"] = report.rows_skipped_volatile;
  dict["rows_skipped_persistent"] = report.rows_skipped_persistent;
  dict["volatile_nanoseconds"] = report.volatile_nanoseconds;
  dict["persistent_nanoseconds"] = report.persistent_nanoseconds;
  dict["rows_from_cache"] = report.rows_from_cache;
  dict["rows_deferred"] = report.rows_deferred;
  dict["rows_repeated"] = report.rows_repeated;
  dict["rows_unwaited"] = report.rows_unwaited;
  return dict;
}

// What the caches of a model (an element of "models") will take, by device: {device: (of each table its rows and bytes,
// bytes of workspaces, pinned bytes of the host)}.
py::dict PlanCaches(const std::string& json, const std::vector<uint64_t>& table_rows) {
  const hps::ModelConfig model = Unwrap(hps::ParseModelConfig(json));
  int devices = 0;
  for (const int device : model.deployed_devices) devices = std::max(devices, device + 1);
  py::dict plans;
  for (const hps::DevicePlan& plan : Unwrap(hps::PlanCaches(model, table_rows, devices))) {
    py::list tables;
    uint64_t workspaces = plan.device_bytes, pinned_workspaces = plan.pinned_bytes;
    for (const hps::TableCachePlan& table : plan.tables) {
      const auto [device_bytes, pinned_bytes] = table.memory;
      tables.append(py::make_tuple(table.spec.capacity_rows, device_bytes, pinned_bytes));
      workspaces -= device_bytes;
      pinned_workspaces -= pinned_bytes;
    }
    plans[py::int_(plan.device)] = py::make_tuple(tables, workspaces, pinned_workspaces);
  }
  return plans;
}

// (rows, found, report): float32 keys.shape + [width], bool keys.shape, dict.
py::tuple Lookup(const hps::ParameterServer& server, const py::array& key_array, const std::string& model,
                 const TableName& table) {
  const auto keys = KeysOf(key_array);
  const hps::LookupSession session = Unwrap(server.NewSession(model));
  hps::DenseLookup lookup;
  lookup.table = FindTable(session, table);
  lookup.width = Unwrap(session.Tables())[lookup.table].width;
  std::vector<py::ssize_t> shape(keys.shape(), keys.shape() + keys.ndim());
  py::array_t<bool> found(shape);
  shape.push_back(lookup.width);
  py::array_t<float> rows(shape);
  lookup.keys = std::span(reinterpret_cast<const hps::Key*>(keys.data()), static_cast<size_t>(keys.size()));
  lookup.rows = rows.mutable_data();
  lookup.found = found.mutable_data();
  hps::LookupReport report;
  Check(Unlocked([&] { return session.Lookup(std::span(&lookup, 1), {}, &report); }));
  return py::make_tuple(rows, found, ReportDict(report));
}

py::dict SharedMemoryDict(const std::string& path) {
  const hps::SharedMemoryFound found = Unwrap(Unlocked([&] { return hps::InspectSharedMemory(path); }));
  py::list tables;
  for (const hps::SharedTableFound& table : found.tables) {
    tables.append(py::make_tuple(py::bytes(table.name), table.row_bytes, table.rows, table.evicted_rows, table.bytes));
  }
  py::list records;
  for (const auto& [name, value] : found.records) records.append(py::make_tuple(py::bytes(name), py::bytes(value)));
  py::dict dict;
  dict["file_bytes"] = found.file_bytes;
  dict["taken_bytes"] = found.taken_bytes;
  dict["user"] = found.user;
  dict["finished"] = found.finished;
  dict["format"] = found.layout.format;
  dict["known_format"] = found.known_format;
  dict["num_partitions"] = found.layout.num_partitions;
  dict["key_bytes"] = found.layout.key_bytes;
  dict["overflow_margin"] = found.layout.overflow_margin;
  dict["auto_remove"] = found.auto_remove;
  dict["attachments"] = found.attachments;
  dict["used_bytes"] = found.used_bytes;
  dict["processes"] = found.processes;
  dict["tables"] = tables;
  dict["records"] = records;
  dict["damage"] = found.damage;
  return dict;
}

py::dict ReadinessDict(const hps::ParameterServer& server) {
  const hps::Readiness readiness = Unlocked([&] { return server.CheckReadiness(); });
  py::dict tiers;
  for (const auto& tier : readiness.tiers) {
    py::dict state;
    state["store"] = tier.store;
    state["needed"] = tier.needed;
    state["reachable"] = tier.reachable;
    state["error"] = tier.error;
    tiers[py::str(tier.tier)] = state;
  }
  py::dict dict;
  dict["ready"] = readiness.ready;
  dict["reason"] = readiness.reason;
  dict["tiers"] = tiers;
  dict["models"] = readiness.models;
  return dict;
}

std::vector<std::pair<std::string, uint32_t>> Tables(const hps::ParameterServer& server, const std::string& model) {
  std::vector<std::pair<std::string, uint32_t>> tables;
  for (const auto& table : Unwrap(Unwrap(server.NewSession(model)).Tables())) {
    tables.emplace_back(table.name, table.width);
  }
  return tables;
}

}  // namespace

PYBIND11_MODULE(_hps, m) {
  m.doc() = "Native core of hierarchical_parameter_server; use the package, not this module.";

  py::class_<hps::ParameterServer, std::shared_ptr<hps::ParameterServer>>(m, "ParameterServer")
      .def("lookup", &Lookup)
      .def("tables", &Tables)
      .def("model_names", &hps::ParameterServer::ModelNames)
      .def("load_model",
           [](hps::ParameterServer& server, const std::string& json) {
             const hps::ModelConfig model = ParseModel(json);
             Check(Interruptible([&](const auto* cancelled) { return server.LoadModel(model, cancelled); }));
           })
      .def("replace_model",
           [](hps::ParameterServer& server, const std::string& json) {
             const hps::ModelConfig model = ParseModel(json);
             Check(Interruptible([&](const auto* cancelled) { return server.ReplaceModel(model, cancelled); }));
           })
      .def("unload_model", [](hps::ParameterServer& server,
                              const std::string& name) { Check(Unlocked([&] { return server.UnloadModel(name); })); })
      .def("readiness", &ReadinessDict)
      .def("stats_json",
           [](const hps::ParameterServer& server) { return Unlocked([&] { return server.StatsJson(); }); })
      .def("prometheus_text",
           [](const hps::ParameterServer& server) { return Unlocked([&] { return server.PrometheusText(); }); })
      .def("close", [](hps::ParameterServer& server) { Check(Unlocked([&] { return server.Close(); })); })
      .def_property_readonly("closed", &hps::ParameterServer::closed);

  m.def("open_server", [](const std::string& path) {
    return Unwrap(
        Interruptible([&](const auto* cancelled) { return hps::ParameterServer::Open(path, OnHost(cancelled)); }));
  });
  m.def("open_server_from_json", [](const std::string& json) {
    hps::ServerConfig config = Unwrap(hps::ParseConfig(json));
    Check(hps::MakePathsAbsolute("", &config));
    return Unwrap(
        Interruptible([&](const auto* cancelled) { return hps::ParameterServer::Open(config, OnHost(cancelled)); }));
  });
  m.def("init_default_server", [](const std::string& path) {
    Check(Interruptible([&](const auto* cancelled) {
      return hps::InitDefaultServer(path, hps::ServerOptions{.cancelled = cancelled});
    }));
  });
  m.def("open_servers", &hps::OpenServers);
  m.def("prometheus_text",
        [] { return Unlocked([] { return hps::ParameterServer::PrometheusText(hps::OpenServers()); }); });
  m.def("shutdown_servers", [] { Check(Unlocked([] { return hps::ShutdownServers(); })); });
  // For atexit: closes every server, then waits for the calls of other threads.
  m.def("close_at_exit", [] { Calls().EndAll(); });
  m.def("bind_handle",
        [](const std::string& handle, const std::string& path) { Check(hps::BindHandle(handle, path)); });
  m.def("release_handle", [](const std::string& handle) {
    Unlocked([&] {
      hps::ReleaseHandle(handle);
      return 0;
    });
  });

  m.def("parse_config", [](const std::string& json, const std::string& origin) {
    return hps::CanonicalJson(Unwrap(hps::ParseConfig(json, origin)));
  });
  m.def("load_config", [](const std::string& path) { return hps::CanonicalJson(Unwrap(hps::LoadConfig(path))); });
  // Makes the checks of a load.
  m.def("fingerprint_table_folder", [](const std::string& path, uint32_t width) {
    return Unwrap(Unlocked([&] { return hps::FingerprintTableFolder(path, width); }));
  });
  m.def("shared_table_name", &hps::SharedTableName);
  m.def("inspect_shared_memory", &SharedMemoryDict);
  m.def("available_memory_bytes", &hps::AvailableMemoryBytes, py::arg("root") = "");
  m.def(
      "count_dense_keys",
      [](const std::string& path, uint64_t rows, uint64_t whole_rows) {
        const hps::DenseKeys dense = Unwrap(Unlocked([&] { return hps::CountDenseKeys(path, rows, whole_rows); }));
        return py::make_tuple(dense.rows, dense.sampled, dense.others_early);
      },
      py::arg("path"), py::arg("rows"), py::arg("whole_rows") = uint64_t{8} << 20);
  // Sums of memory before anything is loaded; `policy` and `margin` as in volatile_db.
  const auto with_shape = [&](const char* name, uint64_t (*bytes)(const hps::TableShape&)) {
    m.def(
        name,
        [bytes](uint64_t rows, uint64_t dense_rows, uint64_t row_bytes, uint32_t num_partitions, uint64_t margin,
                const std::string& policy, bool hashed_early) {
          return bytes({rows, dense_rows, row_bytes, num_partitions, Overflow(margin, policy), hashed_early});
        },
        py::arg("rows"), py::arg("dense_rows"), py::arg("row_bytes"), py::arg("num_partitions"),
        py::arg("margin") = std::numeric_limits<uint64_t>::max(), py::arg("policy") = "evict_oldest",
        py::arg("hashed_early") = true);
  };
  with_shape("hash_map_table_bytes", &hps::HashMapTableBytes);
  with_shape("hash_map_limit_bytes", &hps::HashMapLimitBytes);
  with_shape("shared_table_bytes", &hps::SharedTableBytes);
  m.def("capacity_rows", [](const std::string& type, uint32_t num_partitions, uint64_t margin) {
    const hps::OverflowOptions overflow{.margin = margin};
    if (type == "hash_map") return hps::HashMapCapacityRows(overflow, num_partitions);
    if (type == "multi_process_hash_map") return hps::SharedCapacityRows(overflow, num_partitions);
    return hps::CapacityRows(overflow, num_partitions);
  });
  m.def("shared_memory_own_bytes", &hps::SharedMemoryOwnBytes);
  m.def("rocksdb_load_bytes", &hps::RocksDbLoadBytes);
  m.def("plan_caches", &PlanCaches);
  m.def("whole_table_bytes", &hps::WholeTableBytes);
  m.attr("cache_writer_bytes") = hps::CacheWriter::kBufferBytes;
  m.attr("rocksdb_bulk_bytes") = hps::kRocksDbBulkBytes;
  m.def("config_hash", [](const std::string& path) { return hps::ConfigHash(Unwrap(hps::LoadConfig(path))); });
  m.def("config_json_schema", &hps::ConfigJsonSchema);
  m.def("config_reference", &hps::ConfigReferenceMarkdown);
  m.attr("default_handle") = hps::kDefaultHandle;
}

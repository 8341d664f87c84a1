// Tells thread sanitizer about librocksdb: it is not instrumented, so its own locks are not seen, and memory that it
// hands from thread to thread (grouped write batches, memtables, cached blocks, what goes at exit) looks racy. The
// functions of std named here (a string's, and growing a set of strings) are those that the library calls in our copy.
// Include in one source of a test program.

#ifndef HPS_TESTS_ROCKSDB_RACES_H_
#define HPS_TESTS_ROCKSDB_RACES_H_

#ifdef __SANITIZE_THREAD__
extern "C" const char* __tsan_default_suppressions() {
  return "called_from_lib:librocksdb.so\nrace:librocksdb.so\nrace:rocksdb::\nrace:_M_replace_aux\n"
         "race:std::__detail::_Identity, std::equal_to<std::__cxx11::basic_string*::_M_rehash\n";
}
#endif

#endif  // HPS_TESTS_ROCKSDB_RACES_H_
